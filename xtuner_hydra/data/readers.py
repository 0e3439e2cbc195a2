"""The records of a file, in parts that different processes can read: JSON Lines (plain, .gz, .zst), a JSON array (.json), Parquet.

Parquet and .zst need pyarrow (the extra `data`). A record has a number by which people find it: its line, or its row in Parquet."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_hydra.data.sources import BYTE_ORDER_MARK, chunks, lines, read_chunk
from xtuner_hydra.errors import DataError

ROWS = 50_000
"""Rows of Parquet that are read at once."""


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of a file, or rows [start, stop) of a Parquet file's row group.

    size: bytes on the disk, about, for a progress bar. content: what stands there, where it cannot be read from the middle of the file."""

    file: Path
    start: int
    stop: int
    size: int
    content: bytes | None = None
    row_group: int = 0


@dataclass(frozen=True)
class Records:
    """(number, record) pairs of a part; a record is a line's bytes, or decoded already. Numbers count from 1 at the part's start; count: how far."""

    pairs: list[tuple[int, Any]]
    count: int


def unit(file: Path) -> str:
    """What the numbers of the file's records count: `line` or `row`."""
    return "row" if file.suffix == ".parquet" else "line"


def split(file: Path, size: int) -> Iterator[Part]:
    """`file` in parts of about `size` bytes, in order. Raises DataError where it cannot be read."""
    if file.suffix == ".parquet":
        yield from _rows_of(file)
    elif file.suffix in (".gz", ".zst"):
        yield from _decompressed(file, size)
    elif file.suffix == ".json" and (array := _array(file)) is not None:
        yield Part(file, 0, len(array), len(array), array)
    else:
        for start, stop in chunks(file, size):
            yield Part(file, start, stop, stop - start)


def records(part: Part) -> Records:
    """Read a part. Raises DataError where the file cannot be read any more."""
    if part.file.suffix == ".parquet":
        rows = _read_rows(part)
        return Records(list(enumerate(rows, 1)), len(rows))
    content = part.content if part.content is not None else read_chunk(part.file, part.start, part.stop)
    if part.file.suffix == ".json" and part.content is not None:
        return Records(list(_items(content)), content.count(b"\n"))
    return Records(list(lines(content)), content.count(b"\n"))


def _decompressed(file: Path, size: int) -> Iterator[Part]:
    """Whole lines, decompressed one after the other: such a file has no middle to start from."""
    rest, start, told = b"", 0, 0
    on_disk = file.stat().st_size
    try:
        with file.open("rb") as raw, _decompressor(file, raw) as stream:
            while block := stream.read(size):
                block = block.removeprefix(BYTE_ORDER_MARK) if not start and not rest else block
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if content := whole + newline:
                    read = min(raw.tell(), on_disk)
                    yield Part(file, start, start + len(content), read - told, content)
                    start, told = start + len(content), read
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{file} cannot be decompressed: {error}") from None
    if rest:
        yield Part(file, start, start + len(rest), on_disk - told, rest)


def _decompressor(file: Path, raw: Any) -> Any:
    if file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return _pyarrow(file).CompressedInputStream(raw, "zstd")


def _rows_of(file: Path) -> Iterator[Part]:
    _pyarrow(file)
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from None
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for start in range(0, group.num_rows, ROWS):
            stop = min(start + ROWS, group.num_rows)
            size = group.total_byte_size * (stop - start) // group.num_rows
            yield Part(file, start, stop, size, row_group=number)


def _read_rows(part: Part) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        group = pyarrow.parquet.ParquetFile(part.file).read_row_group(part.row_group)
    except (OSError, ValueError) as error:
        raise DataError(f"{part.file} cannot be read as Parquet: {error}") from None
    rows = group.slice(part.start, part.stop - part.start).to_pylist()
    return [{key: _without_gaps(value) for key, value in row.items()} for row in rows]


def _without_gaps(value: Any) -> Any:
    """A column's value without the keys that are null: in Parquet all structs of a column have the same keys, and those that a record did
    not have, such as the arguments of another tool, are filled up with null."""
    if isinstance(value, list):
        return [_without_gaps(item) for item in value]
    return {key: _without_gaps(item) for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{file}: {file.suffix} files need pyarrow; pip install 'xtuner-hydra[data]'") from None
    return pyarrow


def _array(file: Path) -> bytes | None:
    """The content of a .json file that is one list of records; None for one that holds a record a line (each perhaps a list of messages)."""
    first = _first_line(file)
    if not first.startswith(b"[") or (first.endswith(b"]") and not _is_records(first)):
        return None
    content = read_chunk(file, 0, file.stat().st_size)
    return content if not first.endswith(b"]") or sum(1 for _ in lines(content)) == 1 else None


def _first_line(file: Path) -> bytes:
    """The first line that is not blank."""
    try:
        with file.open("rb") as stream:
            return next((line for one in stream if (line := one.removeprefix(BYTE_ORDER_MARK).strip())), b"")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _is_records(line: bytes) -> bool:
    """Whether a line is a list of records, and not one of messages."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(value) and not any(isinstance(item, dict) and "role" in item for item in value)


def _items(content: bytes) -> Iterator[tuple[int, Any]]:
    """(line, item) of each item of a JSON list; at what is no JSON the rest comes as it is, with the line where it starts."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        yield 1, content
        return
    decoder, position, line, counted = json.JSONDecoder(), _skip(text, text.index("[") + 1), 1, 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            item, stop = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            yield line, text[position:].encode()
            return
        yield line, item
        position = _skip(text, stop)


def _skip(text: str, position: int) -> int:
    """The next position that is neither white space nor a comma."""
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position
