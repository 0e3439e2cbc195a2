"""Files named by data.path, and their lines."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from xtuner_hydra.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def resolve_files(path: str | list[str], key: str) -> list[Path]:
    """The files behind `path`: a file, a directory (recursively, sorted, what ends in SUFFIXES), a glob, or a list of these.

    Raises DataError that names `key` for what is not there, cannot be read, or is empty."""
    paths = [path] if isinstance(path, str) else path
    files = [file for one in paths for file in _resolve(os.path.expanduser(one), key)]
    for file in files:
        if not os.access(file, os.R_OK):
            raise DataError(f"{key}: {file}: cannot be read (permissions)")
        if file.stat().st_size == 0:
            raise DataError(f"{key}: {file}: the file is empty")
    return files


def chunks(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """Byte ranges (start, stop) that cover `file` in whole lines, each of about `size` bytes. DataError where it cannot be read any more."""
    try:
        with file.open("rb") as stream:
            end, start = file.stat().st_size, 0
            while start < end:
                stream.seek(min(start + size, end))
                stream.readline()  # to the end of the line that the range ends in
                yield start, stream.tell()
                start = stream.tell()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def read_chunk(file: Path, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of `file`, without a byte order mark at its start. DataError where it cannot be read any more."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            content = stream.read(stop - start)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    return content.removeprefix(BYTE_ORDER_MARK) if start == 0 else content


def lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not blank; numbers count from 1 and count blank lines too."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line := line.rstrip():
            yield number, line


def _resolve(path: str, key: str) -> list[Path]:
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise DataError(f"{key}: {path}: a directory without {', '.join('*' + suffix for suffix in SUFFIXES)} files")
        return files
    if os.path.exists(path):
        return [Path(path)]
    if glob.has_magic(path):
        files = sorted(Path(file) for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise DataError(f"{key}: {path}: no file matches this pattern")
        return files
    raise DataError(f"{key}: {path}: no such file or directory (from {os.getcwd()})")
