"""The commit protocol. A checkpoint or an export exists once its directory has its final name, and not before:

    write into .step-N.tmp/ -> manifest.json (every file with its size and checksum) -> fsync everything -> rename to step-N/ -> fsync the parent

A crash leaves a staging directory, which the next save of that name removes. If one rank cannot write, all ranks fail and say why."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from xtuner_hydra.errors import RefusedError, SaveError
from xtuner_hydra.files import checksum, sync, sync_tree, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_SET_ASIDE = ".step-*.replaced"

log = logging.getLogger("xtuner_hydra")


Checksums = dict[str, str]
"""Names of files under a directory, each with its checksum."""


def commit(directory: Path, write: Callable[[Path], Checksums | None], *, group: dist.ProcessGroup | None = None) -> Path:
    """Let every rank `write` into a staging directory, then rename it to `directory`. `write` returns the checksums that it knows already.

    Collective over `group` (default: all ranks): all call it with the same arguments. `write` may itself be collective; it must then take
    part to its end on every rank, even if one fails. Raises SaveError on all ranks if any of them fails."""
    staging = directory.with_name(f".{directory.name}.tmp")
    try:
        on_first_rank(lambda: _begin(staging), directory, group)
        known: Checksums = {}
        for checksums in _together(lambda: write(staging), directory, group):
            known |= checksums or {}
        on_first_rank(lambda: _finish(staging, directory, known), directory, group)
    except SaveError:
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk has room again
        raise
    return directory


def on_first_rank(action: Callable[[], object], directory: Path, group: dist.ProcessGroup | None = None) -> None:
    """Do `action`, which saves `directory` or belongs to it, on the first rank alone; SaveError on all ranks if it fails. Collective."""
    _together(action if dist.get_rank() == 0 else lambda: None, directory, group)


def _together(action: Callable[[], Any], directory: Path, group: dist.ProcessGroup | None) -> list[Any]:
    """Do `action` on every rank; all results by rank, or SaveError on all ranks if it failed on any. Collective."""
    result, error = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as cause:  # DCP's is not an Exception
        error = _cause(cause)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, error), group)
    for rank, (_, failed) in enumerate(outcomes):
        if failed is not None:
            culprit, words = failed
            raise SaveError(directory, (rank if culprit is None else culprit) if len(outcomes) > 1 else None, words)
    return [result for result, _ in outcomes]


def committed(parent: Path) -> list[Path]:
    """The committed step-N directories under `parent`, oldest first. Those whose files do not have the sizes in their manifest are left out."""
    return [path for path in numbered(parent) if damage(path) is None]


def newest_whole(parent: Path) -> Path | None:
    """The newest undamaged step-N directory under `parent` (reads every file); damaged ones are skipped with a warning."""
    for path in reversed(numbered(parent)):
        if (problem := damage(path, content=True)) is None:
            return path
        log.warning(f"{path} is skipped: {problem}")
    return None


def numbered(parent: Path) -> list[Path]:
    """All step-N directories under `parent`, whole or not, oldest first."""
    return sorted((path for path in parent.glob("step-*") if has_step_name(path)), key=step_of)


def has_saved(parent: Path) -> bool:
    """Whether `parent` has a step-N directory, even one that a crash left set aside (`put_back` restores its name)."""
    return bool(numbered(parent)) or any(parent.glob(_SET_ASIDE))


def has_step_name(directory: Path) -> bool:
    """Whether `directory` is called step-N."""
    return _NAME.fullmatch(directory.name) is not None


def step_of(directory: Path) -> int:
    """N of step-N."""
    match = _NAME.fullmatch(directory.name)
    assert match, directory
    return int(match[1])


def damage(directory: Path, *, content: bool = False) -> str | None:
    """What is wrong with a committed directory, or None: another directory's manifest, a file that is missing or has another size; with
    `content`, which reads every file, also another checksum."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files, name = manifest["files"], manifest["name"]
        expected = {PurePosixPath(file): (entry["size"], entry["crc32"]) for file, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or cannot be read"
    if not expected:
        return f"{MANIFEST} lists no files"
    if name != directory.name and has_step_name(directory):
        return f"{MANIFEST} belongs to {name}"
    for file, (size, crc32) in expected.items():
        if file.is_absolute() or ".." in file.parts:
            return f"{MANIFEST} names {file}, which is outside the directory"
        try:
            problem = _damage(directory / file, size, crc32 if content else None)
        except OSError as error:  # a bad sector, or no permission
            problem = f"cannot be read: {error.strerror}"
        if problem is not None:
            return f"{file} {problem}"
    return None


def _damage(path: Path, size: int, crc32: str | None) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, not {size}"
    if crc32 is not None and checksum(path) != crc32:
        return "differs from what was saved"
    return None


def remove(directory: Path) -> None:
    """Delete a committed directory; a crash midway leaves nothing that looks like one."""
    shutil.rmtree(_set_aside(directory))


def leftovers(parent: Path) -> list[Path]:
    """What interrupted saves and removals left under `parent`. One that is set aside and has nothing in its place is none: `put_back` restores it."""
    found = [path for path in parent.glob(".step-*") if path.suffix in (".tmp", ".old", ".replaced") and path.is_dir()]
    return [path for path in found if path.suffix != ".replaced" or _home(path).exists()]


def _begin(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def _finish(staging: Path, directory: Path, known: Checksums) -> None:
    names = [(path, str(path.relative_to(staging))) for path in sorted(staging.rglob("*")) if path.is_file()]
    files = {name: {"size": path.stat().st_size, "crc32": known.get(name) or checksum(path)} for path, name in names}
    write_json(staging / MANIFEST, {"name": directory.name, "files": files})
    sync_tree(staging)
    # the same step may be saved again, by a run that was resumed from before it
    old = _set_aside(directory, ".replaced") if directory.exists() else None
    try:
        os.rename(staging, directory)
    except OSError:
        put_back(directory.parent)
        raise
    sync(directory.parent)
    if old is not None:
        shutil.rmtree(old)


def put_back(parent: Path) -> None:
    """Restore the name of what a crash left set aside while a step was being saved a second time."""
    for aside in parent.glob(_SET_ASIDE):
        if not _home(aside).exists():
            os.rename(aside, _home(aside))


def _home(aside: Path) -> Path:
    """step-N of .step-N.replaced."""
    return aside.with_name(aside.stem[1:])


def _set_aside(directory: Path, suffix: str = ".old") -> Path:
    aside = directory.with_name(f".{directory.name}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(directory, aside)
    return aside


def _cause(error: Exception | CheckpointException) -> tuple[int | None, str]:
    """(the rank that failed, if DCP passed the error on from there, else None; what went wrong)."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return rank, _cause(cause)[1] if isinstance(cause, Exception) else repr(cause)
    if isinstance(error, OSError) and error.strerror:
        return None, error.strerror + (f": {error.filename}" if error.filename else "")
    if isinstance(error, RefusedError):
        return None, str(error)
    return None, f"{type(error).__name__}: {error}"
