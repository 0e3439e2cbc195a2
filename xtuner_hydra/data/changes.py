"""Which data files are no longer what a run has read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner_hydra.data.cache import hash_file

DATA_FILE = "data.json"


def changed_files(run_dir: Path) -> list[str]:
    """A phrase for each data file of the run that is no longer what data.json notes: `FILE: gone`, `FILE: changed (...)`. Never raises.

    The run can go on: it reads the token cache, not the files.

    Costs a stat a file. One whose time of change differs at the same size is read and hashed, once in a process for each such time: a file
    that was only touched has not changed. What is not known, as data.json of an older version lacks it, is not told."""
    try:
        saved = json.loads((run_dir / DATA_FILE).read_text(encoding="utf-8"))
        noted = dict(entry for part in ("train", "eval") for entry in _noted(saved[part] or {}))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return []
    return [f"{file}: {change}" for file, (digest, stamp) in noted.items() if (change := _change(Path(file), digest, stamp))]


def _noted(part: dict[str, Any]) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """(file, (hash, [size, time of change in ns])) of each file of a part of data.json."""
    for file, digest, stamp in zip(part.get("files", []), part.get("hashes", []), part.get("stamps", []), strict=False):
        yield file, (digest, stamp)


def _change(file: Path, digest: str, stamp: list[int]) -> str | None:
    try:
        found = file.stat()
        if [found.st_size, found.st_mtime_ns] == stamp:
            return None
        if found.st_size != stamp[0]:
            return f"changed ({stamp[0]:,} bytes when the run was prepared, {found.st_size:,} now)"
        return None if hash_file(file) == digest else "changed (other content of the same size)"
    except (FileNotFoundError, NotADirectoryError):
        return "gone"
    except OSError as error:
        return f"cannot be read any more ({error.strerror or error})"
