"""Files named by data.path, and their lines. However long a line is, little more than LINE_BYTES of it are ever held."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from xtuner_hydra.data.bad_lines import BadLine, Kind
from xtuner_hydra.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

LINE_BYTES = 16 << 20
"""The longest line that is used, its end apart: 16 MiB, some four million tokens. A longer one is bad (`too large`)."""
BLOCK = 1 << 20


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
                while (piece := stream.readline(BLOCK)) and not piece.endswith(b"\n"):
                    pass  # to the end of the line that the range ends in
                yield start, stream.tell()
                start = stream.tell()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def read_chunk(file: Path, start: int, stop: int) -> Iterator[bytes | BadLine]:
    """Bytes [start, stop) of `file`, which are whole lines, as `blocks` has them. DataError where it cannot be read any more."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            yield from blocks(lambda size: stream.read(min(size, stop - stream.tell())), BLOCK, begins_file=start == 0)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def blocks(read: Callable[[int], bytes], size: int, *, begins_file: bool) -> Iterator[bytes | BadLine]:
    """What `read` gives, without a byte order mark, in blocks of whole lines of `size` bytes and a line more; BadLine for one that is too long."""
    rest = read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK) if begins_file else b""
    while block := read(size):
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            yield whole + newline
        if len(rest) > LINE_BYTES:
            bad, rest = _pass_over(rest, read, size)
            yield bad
    if rest:
        yield rest


def lines(content: bytes) -> Iterator[tuple[int, bytes | BadLine]]:
    """(number, line) of each line that is not blank, BadLine for one that cannot be text; numbers count from 1 and count blank lines too."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if len(line) > LINE_BYTES or b"\0" in line:
            yield number, _no_text(len(line), line.count(0), line.find(0))
        elif line := line.rstrip():
            yield number, line


def _pass_over(begun: bytes, read: Callable[[int], bytes], size: int) -> tuple[BadLine, bytes]:
    """Read on to the end of the line that `begun` begins: (what is wrong with it, what was read after its end)."""
    length, zeros, first, rest = len(begun), begun.count(0), begun.find(0), b""
    while block := read(size):
        more, newline, rest = block.partition(b"\n")
        if first < 0 and (place := more.find(0)) >= 0:
            first = length + place
        length, zeros = length + len(more), zeros + more.count(0)
        if newline:
            break
    return _no_text(length, zeros, first), rest


def _no_text(length: int, zeros: int, first: int) -> BadLine:
    """For a line of `length` bytes, of which `zeros` are 0, the first at `first`."""
    if zeros:
        where = f"{zeros:,} of {length:,}, the first at byte {first + 1:,}"
        return BadLine(Kind.NUL, f"NUL bytes ({where}): a crash or a full disk leaves such holes, and UTF-16 looks like that")
    return BadLine(Kind.TOO_LARGE, f"the line has {length:,} bytes, and {LINE_BYTES:,} are the most that can be used")


def _resolve(path: str, key: str) -> list[Path]:
    if os.path.isdir(path):
        files = sorted(_below(Path(path), set()))
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


def _below(directory: Path, seen: set[str]) -> Iterator[Path]:
    """Data files in `directory` and below it, through links to directories too, but each real directory once: `seen` has those so far. Hidden ones
    are what a notebook or an editor keeps for itself (`.ipynb_checkpoints/`), which holds the data a second time."""
    if (real := os.path.realpath(directory)) in seen:
        return
    seen.add(real)
    for entry in sorted(directory.iterdir(), key=lambda entry: (entry.is_symlink(), entry)):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry, seen)
        elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
            yield entry
