"""The commit protocol. A checkpoint exists once its directory has its final name, and not before:

    write into .step-N.tmp/ -> manifest.json (every file with its size) -> fsync everything -> rename to step-N/ -> fsync the parent

A crash leaves a staging directory, which the next save of that name removes. Old ones go after the new one stands."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from xtuner_hydra.files import sync_directory, sync_tree, write_json

_NAME = re.compile(r"step-(\d+)")


def commit(directory: Path, write: Callable[[Path], None], *, keep: int | None) -> Path:
    """Let every rank `write` into a staging directory, then make it `directory`; it stays with the `keep` - 1 newest of its siblings
    (None: with all).

    Collective: all ranks call it with the same arguments. `write` may itself be collective."""
    staging = directory.with_name(f".{directory.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    write(staging)
    dist.barrier()
    if dist.get_rank() == 0:
        _finish(staging, directory)
        if keep is not None:
            _remove_old(directory, keep)
    dist.barrier()
    return directory


def committed(parent: Path) -> list[Path]:
    """The committed step-N directories under `parent`, oldest first. Those whose files do not fit their manifest are left out."""
    found = [path for path in parent.glob("step-*") if _NAME.fullmatch(path.name) and damage(path) is None]
    return sorted(found, key=step_of)


def step_of(directory: Path) -> int:
    """N of step-N."""
    match = _NAME.fullmatch(directory.name)
    assert match, directory
    return int(match[1])


def damage(directory: Path) -> str | None:
    """What is wrong with a committed directory (a file that is missing or has another size), or None."""
    try:
        sizes: dict[str, int] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json is missing or cannot be read"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def _remove_old(directory: Path, keep: int) -> None:
    others = [path for path in committed(directory.parent) if path != directory]  # later ones too, of a run that went further
    for old in others[: max(0, len(others) + 1 - keep)]:
        shutil.rmtree(old)


def _finish(staging: Path, directory: Path) -> None:
    files = {str(path.relative_to(staging)): path.stat().st_size for path in sorted(staging.rglob("*")) if path.is_file()}
    write_json(staging / "manifest.json", {"files": files})
    sync_tree(staging)
    if directory.exists():  # the same step saved again, by a run that was resumed from before it
        shutil.rmtree(directory)
    os.rename(staging, directory)
    sync_directory(directory.parent)
