"""The records of a file, in parts that different processes can read: JSON Lines or, in a .json, a JSON array (plain, .gz, .zst), Parquet.

Parquet and .zst need pyarrow (the extra `data`). A record has a number by which people find it: its line, or its row in Parquet.
A file of lines is never held as a whole, whatever its lines; a JSON array is, and so is a row group of Parquet."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xtuner_hydra.data.bad_lines import BadLine, Kind
from xtuner_hydra.data.sources import BYTE_ORDER_MARK, LINE_BYTES, blocks, chunks, lines, read_chunk
from xtuner_hydra.errors import DataError

ROWS = 50_000
"""Rows of Parquet that are read at once."""

_COMPRESSED = (".gz", ".zst")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a duplicate key, of which Python would silently keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""For records of data."""


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of a file, or rows [start, stop) of a Parquet file's row group.

    size: bytes on the disk, about, for a progress bar. content: what stands there, where it cannot be read from the middle of the file
    (start and stop are 0 then); BadLine for a line that is too long to be kept. is_array: the content is a JSON array, not lines."""

    file: Path
    start: int
    stop: int
    size: int
    content: bytes | BadLine | None = None
    row_group: int = 0
    is_array: bool = False


@dataclass(frozen=True)
class Records:
    """(number, record) pairs of a part; a record is a line's bytes, or decoded already, or a BadLine.

    Numbers count from 1 at the part's start; count: how far."""

    pairs: list[tuple[int, Any]]
    count: int


def unit(file: Path) -> str:
    """What the numbers of the file's records count: `line` or `row`."""
    return "row" if _suffix(file) == ".parquet" else "line"


def reading(file: Path) -> str:
    """How the file's name says that it is to be read; the same bytes are other records under another."""
    if _suffix(file) == ".parquet":
        return "parquet"
    compressed = _suffix(file) if _suffix(file) in _COMPRESSED else ""
    return f"{'perhaps an array' if _may_be_array(file) else 'lines'}{compressed}"


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _may_be_array(file: Path) -> bool:
    return ".json" in (_suffix(file), _suffix(file.with_suffix("")))


def split(file: Path, size: int) -> Iterator[Part]:
    """`file` in parts of about `size` bytes, in order. Raises DataError where it cannot be read."""
    if _suffix(file) == ".parquet":
        yield from _rows_of(file)
    elif _may_be_array(file) and (array := _array(file)) is not None:
        yield Part(file, 0, 0, file.stat().st_size, array, is_array=True)
    elif _suffix(file) in _COMPRESSED:
        yield from _decompressed(file, size)
    else:
        for start, stop in chunks(file, size):
            yield Part(file, start, stop, stop - start)


def records(part: Part) -> Records:
    """Read a part. Raises DataError where the file cannot be read any more."""
    if _suffix(part.file) == ".parquet":
        rows = _read_rows(part)
        return Records(list(enumerate(rows, 1)), len(rows))
    if part.is_array and isinstance(part.content, bytes):
        return Records(list(_items(part.content)), part.content.count(b"\n"))
    pairs: list[tuple[int, Any]] = []
    count = 0
    for block in read_chunk(part.file, part.start, part.stop) if part.content is None else [part.content]:
        if isinstance(block, BadLine):
            pairs.append((count + 1, block))
            count += 1
        else:
            pairs += [(count + number, line) for number, line in lines(block)]
            count += block.count(b"\n")
    return Records(pairs, count)


def _decompressed(file: Path, size: int) -> Iterator[Part]:
    """Whole lines, decompressed one after the other: such a file has no middle to start from."""
    told, on_disk = 0, file.stat().st_size
    with _opened(file) as (stream, raw):
        for block in blocks(stream.read, size, begins_file=True):
            read = min(raw.tell(), on_disk)
            yield Part(file, 0, 0, read - told, block)
            told = read


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(what the file holds, decompressed; the file itself). Raises DataError where it cannot be read."""
    try:
        with file.open("rb") as raw:
            if _suffix(file) not in _COMPRESSED:
                yield raw, raw
                return
            with _unpacked(file, raw) as stream:
                yield stream, raw
    except (OSError, EOFError, ValueError, zlib.error) as error:
        what = "decompressed" if _suffix(file) in _COMPRESSED else "read"
        raise DataError(f"{file} cannot be {what}: {getattr(error, 'strerror', None) or error}") from None


def _unpacked(file: Path, raw: BinaryIO) -> Any:
    if _suffix(file) == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_pyarrow(file).CompressedInputStream(raw, "zstd"))


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


def _read_rows(part: Part) -> list[Any]:
    import pyarrow.parquet

    batches, place = [], 0
    try:
        # a group has no middle to start from; in batches, it need not be held whole
        for batch in pyarrow.parquet.ParquetFile(part.file).iter_batches(ROWS, row_groups=[part.row_group]):
            begin, end = max(part.start - place, 0), min(part.stop - place, len(batch))
            batches += [batch.slice(begin, end - begin)] if begin < end else []
            place += len(batch)
            if place >= part.stop:
                break
    except (OSError, ValueError) as error:
        raise DataError(f"{part.file} cannot be read as Parquet: {error}") from None
    rows = pyarrow.Table.from_batches(batches)
    if rows.nbytes <= LINE_BYTES:
        return [_record(row) for row in rows.to_pylist()]
    return [_row(rows.slice(number, 1)) for number in range(rows.num_rows)]


def _row(table: Any) -> dict[str, Any] | BadLine:
    """The one row of a table."""
    return _record(table.to_pylist()[0]) if table.nbytes <= LINE_BYTES else _too_large("row", table.nbytes)


def _too_large(what: str, size: int) -> BadLine:
    return BadLine(Kind.TOO_LARGE, f"the {what} has {size:,} bytes, and {LINE_BYTES:,} are the most that can be used")


def _record(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_gaps(value) for key, value in row.items()}


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
        raise DataError(f"{file}: {_suffix(file)} files need pyarrow; pip install 'xtuner-hydra[data]'") from None
    return pyarrow


def _array(file: Path) -> bytes | None:
    """The content of a file that is one list of records; None for one that holds a record a line (each perhaps a list of messages)."""
    with _opened(file) as (stream, _):
        first = b""
        while not first and (line := stream.readline(LINE_BYTES)):
            first = line.removeprefix(BYTE_ORDER_MARK).strip()
        if not first.startswith(b"["):
            return None
        if not line.endswith(b"\n"):
            first += stream.readline().rstrip()
        if first.endswith(b"]") and (not _is_records(first) or any(not line.isspace() for line in stream)):
            return None
    with _opened(file) as (stream, _):
        return stream.read().removeprefix(BYTE_ORDER_MARK)


def _is_records(line: bytes) -> bool:
    """Whether a line is a list of records, and not one of messages."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(value) and not any(isinstance(item, dict) and "role" in item for item in value)


def _items(content: bytes) -> Iterator[tuple[int, Any]]:
    """(line, item) of each item of a JSON list; where it is not JSON, or has no end, a BadLine is the last."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield line, BadLine(Kind.UTF8, f"not valid UTF-8 (0x{content[error.start]:02x}), and so the whole list cannot be read")
        return
    position, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            item, stop = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, _broken(error, text)
            return
        size = len(text[position:stop].encode()) if stop - position > LINE_BYTES // 4 else 0
        yield line, item if size <= LINE_BYTES else _too_large("item", size)
        position = _skip(text, stop)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] not in ("]", ""):
            line += text.count("\n", counted, position)
            yield (
                line,
                BadLine(Kind.JSON, "not valid JSON (a comma is missing before this item); it and the rest of the list cannot be read"),
            )
            return
    if (end := text[position:].strip()) != "]":
        line += text.count("\n", counted, position)
        yield line, BadLine(Kind.JSON, f"not valid JSON ({'something follows' if end else 'the file ends before'} the end of the list)")


def _broken(error: ValueError | RecursionError, text: str) -> BadLine:
    """For an item of the list in `text` that could not be decoded."""
    rest = "; it and the rest of the list cannot be read"
    if isinstance(error, RecursionError):
        return BadLine(Kind.NESTING, f"nested too deeply{rest}")
    if not isinstance(error, json.JSONDecodeError):
        return BadLine(Kind.JSON, f"not usable JSON ({error}){rest}")
    if text[error.pos : error.pos + 1] == "\0":
        return BadLine(Kind.NUL, f"NUL bytes, which a crash or a full disk leaves{rest}")
    return BadLine(Kind.JSON, f"not valid JSON ({error.msg} at line {error.lineno} column {error.colno}){rest}")


def _skip(text: str, position: int) -> int:
    """The next position that is not white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
