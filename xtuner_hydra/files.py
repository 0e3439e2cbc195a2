"""Files that exist only when complete: written to a temporary file, flushed to disk, then renamed into place."""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_BLOCK = 4 << 20


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically: a reader sees the old content or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            readable_by_others(Path(temporary))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with null for NaN and infinities, which no JSON parser but Python's reads."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def sync_tree(directory: Path) -> None:
    """Flush every file and directory below `directory` to the disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def tree_size(path: Path) -> tuple[int, int]:
    """(files, bytes) of a file or of all below a directory; those deleted while they are counted, as a running run tidies up, do not count."""
    if not path.is_dir():
        return 1, path.lstat().st_size
    sizes = []
    for root, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append(os.lstat(os.path.join(root, name)).st_size)
    return len(sizes), sum(sizes)


def readable_by_others(path: Path) -> None:
    """Give a file the mode of any other new one: a library that writes 0600 would shut out a colleague who may read the directory."""
    path.chmod(0o666 & ~umask())


def checksum(path: Path) -> str:
    """CRC-32 of a file's content, 8 hexadecimal digits: detects damage, not tampering. It runs at several GB/s, SHA-256 at one."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BLOCK))
        while size := file.readinto(buffer):
            crc = zlib.crc32(buffer[:size], crc)
    return f"{crc:08x}"


@cache
def umask() -> int:
    """The process's file mode creation mask; read once, as reading it sets it to 0 for a moment, in which another thread may make a file."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries (new names, renames), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
