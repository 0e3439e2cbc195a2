"""Token cache: every sample's ids and supervision, whole and untruncated, made once and memory-mapped from then on.

A cache is a directory named after its fingerprint, a hash of all that decides its content (the files' content and kind, format, tokenizer, ...):

    ids.bin         uint16 or uint32 (tokens,)   token ids, sample after sample
    supervised.bin  bool (tokens,)               whether the token is to be learnt
    index.bin       int64 (samples, 3)           length, supervised tokens, line number (Parquet: row number) in its file
    meta.json       sizes, samples of each file, the largest id, lines that were skipped; written last

It is written in a staging directory beside its place and renamed, so it is whole or not there. Processes that build the same one at once
each finish; the first to rename wins. One whose files do not fit meta.json is built again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.data.bad_lines import BadLine, Kind
from xtuner_hydra.data.formats import EmptyRecord, Format, Sample, find_format, format_identity, holds_nul
from xtuner_hydra.data.processes import ProcessDied, map_in_processes
from xtuner_hydra.data.readers import DECODER, Part, reading, records, split, unit
from xtuner_hydra.data.tokenizers import Tokenizer, TooDeep
from xtuner_hydra.errors import ConfigError, DataError, RefusedError
from xtuner_hydra.files import sync, sync_tree, write_json
from xtuner_hydra.machine import cores

VERSION = 7
"""Raise it when the files of a cache change, or what a format reads from a line."""

BINARIES = ("ids.bin", "supervised.bin", "index.bin")

CHUNK_BYTES = 4 << 20
SERIAL_BYTES = 32 << 20
"""Below this many bytes of data, starting processes costs more time than they save."""
STALE_SECONDS = 24 * 3600
"""A staging directory untouched for so long was left by a process that was killed."""

log = logging.getLogger("xtuner_hydra")


@dataclass(frozen=True)
class Skipped:
    """A line (or row) that was left out (data.bad_lines=skip). `kind`: a value of bad_lines.Kind."""

    file: str
    line: int
    kind: str
    message: str


class CacheError(Exception):
    """A cache that is missing or broken; the message says how."""


class TokenCache:
    """An open cache. lengths, supervised_lengths, lines: int64 (samples,).

    `supervised_lengths` counts the labels of a whole sample. `lines` are line numbers, from 1. `sample_counts`: samples of each file.
    `largest_id`: of all tokens. `built`: made just now, not found. Known to build_cache, which read the files: `file_hashes`, the SHA-256 of
    each file, and `file_stamps`, its size and time of change (ns)."""

    def __init__(self, directory: Path, files: list[Path], meta: dict[str, Any]) -> None:
        self.directory = directory
        self.files = files
        self.built = False
        self.file_hashes: list[str] = []
        self.file_stamps: list[tuple[int, int]] = []
        self.fingerprint: str = meta["fingerprint"]
        self.sample_counts: list[int] = meta["sample_counts"]
        self.largest_id: int = meta["largest_id"]
        self.skipped = [Skipped(str(files[file]), *rest) for file, *rest in meta["skipped"]]
        index = np.fromfile(directory / "index.bin", dtype=np.int64).reshape(-1, 3)
        self.lengths, self.supervised_lengths, self.lines = np.ascontiguousarray(index.T)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        # a plain array over the map: slices of np.memmap are several times slower
        self._ids = np.asarray(np.memmap(directory / "ids.bin", dtype=meta["dtype"], mode="r"))
        # not mapped: a plan looks at every sample that is cut, and the pages would stay
        self._supervised = (directory / "supervised.bin").open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, sample: int) -> NDArray[np.unsignedinteger]:
        """Token ids of a sample, (tokens,), read-only."""
        return self._ids[self.offsets[sample] : self.offsets[sample + 1]]

    def supervised(self, sample: int) -> NDArray[np.bool_]:
        """Which tokens of a sample are labels, (tokens,), read-only. Never the first: no token comes before it to predict it."""
        return np.frombuffer(os.pread(self._supervised.fileno(), int(self.lengths[sample]), int(self.offsets[sample])), dtype=np.bool_)

    def locate(self, sample: int) -> tuple[Path, int]:
        """(file, line number) that a sample was read from."""
        file = np.searchsorted(np.cumsum(self.sample_counts), sample, side="right")
        return self.files[file], int(self.lines[sample])


def build_cache(
    files: list[Path],
    format: str,
    tokenizer: Tokenizer,
    *,
    bad_lines: str,
    cache_dir: Path,
    num_workers: int | None,
    progress: bool,
    key: str = "data.path",
) -> TokenCache:
    """Open the cache of `files`, or make it.

    num_workers: processes that tokenise (None: one a core). progress: show a bar where stderr is a terminal. key: starts the messages.
    Raises DataError for a line that cannot be used (unless bad_lines is `skip`) and where none can; ConfigError where `cache_dir` cannot be
    written. Nothing is left behind then."""
    stamps = _stamps(files)
    recipe = _Recipe(format, tokenizer, skip=bad_lines == "skip")
    hashes = [hash_file(file) for file in files]
    fingerprint = _fingerprint([f"{reading(file)} {digest}" for file, digest in zip(files, hashes, strict=True)], recipe)
    directory = cache_dir / fingerprint
    if directory.exists():
        try:
            cache = open_cache(directory, files, verify=True)
            cache.file_hashes, cache.file_stamps = hashes, stamps
            return cache
        except CacheError as error:
            log.warning(f"token cache {directory} is broken ({error}); building it again")
    with all_or_nothing(cache_dir), _staging(directory) as staging:
        writer = _Writer(staging, files, recipe, key)
        with closing(_parts(files, recipe, num_workers, progress)) as parts:
            writer.write(parts)
        if _stamps(files) != stamps:
            raise DataError(f"{key}: {', '.join(map(str, files))}: changed while being read. Run again")
        writer.finish(fingerprint)
        is_ours = _publish(staging, directory)
    cache = open_cache(directory, files)
    cache.built, cache.file_hashes, cache.file_stamps = is_ours, hashes, stamps
    return cache


def open_cache(directory: Path, files: list[Path], *, verify: bool = False) -> TokenCache:
    """Open the cache that was built from `files` (only their names are used). Raises CacheError where it is missing or broken.

    verify: read it all, for a change of content that left the sizes alone; a worker need not, as the preparing process just did."""
    return TokenCache(directory, files, _valid_meta(directory, verify=verify))


@contextmanager
def all_or_nothing(cache_dir: Path) -> Iterator[list[TokenCache]]:
    """Where the block refuses its data, take back the caches it put into the list and the directories that were created for them."""
    missing = [path for path in (cache_dir, *cache_dir.parents) if not path.exists()]
    built: list[TokenCache] = []
    try:
        yield built
    except BaseException as error:
        if isinstance(error, RefusedError):
            for cache in built:
                shutil.rmtree(cache.directory, ignore_errors=True)
        for path in missing:
            with suppress(OSError):  # it holds another cache by now, or was never created
                path.rmdir()
        raise


def describe_skipped(skipped: list[Skipped], most: int = 3) -> list[str]:
    """Lines for people: how many lines were left out of each kind, and the first few by name."""
    if not skipped:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(line.kind for line in skipped).most_common())
    first = (f"  {line.file} {unit(Path(line.file))} {line.line}: {line.message}" for line in skipped[:most])
    return [f"{len(skipped)} line{'s' * (len(skipped) > 1)} skipped ({kinds})", *first]


def _valid_meta(directory: Path, *, verify: bool) -> dict[str, Any]:
    """meta.json of a cache whose files fit it: by their sizes, and to `verify` them by their content too."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["version"] != VERSION or meta["fingerprint"] != directory.name:
            raise CacheError("meta.json belongs to another cache")
        if meta.pop("checksum") != _checksum(meta):
            raise CacheError("the content of meta.json has changed")
        for name, size in meta["sizes"].items():
            if (found := (directory / name).stat().st_size) != size:
                raise CacheError(f"{name} has {found} bytes, not {size}")
        for name, digest in meta["hashes"].items() if verify else ():
            if hash_file(directory / name) != digest:
                raise CacheError(f"the content of {name} has changed")
        return meta
    except FileNotFoundError as error:
        raise CacheError(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"meta.json cannot be used ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class _Recipe:
    """How a worker makes samples of lines. skip: go on after a bad line."""

    format: str
    tokenizer: Tokenizer
    skip: bool

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class _Task:
    """A part of a file, for a worker to tokenise."""

    file_number: int
    part: Part


@dataclass(frozen=True)
class _Tokens:
    """What a worker makes of its part. index: int64 (samples, 3) as in index.bin; line numbers count from 1 at the part's start."""

    task: _Task
    ids: NDArray[np.unsignedinteger]
    supervised: NDArray[np.bool_]
    index: NDArray[np.int64]
    bad: list[tuple[int, str, str]]
    line_count: int


def _tokenize(recipe: _Recipe, task: _Task) -> _Tokens:
    """Runs in a worker."""
    read = records(task.part)
    samples, bad = _parse(read.pairs, recipe)
    ids, supervised, index = [np.zeros(0, recipe.dtype)], [np.zeros(0, np.bool_)], []
    for (number, _), encoded in zip(samples, recipe.tokenizer.encode_batch([sample for _, sample in samples]), strict=True):
        if isinstance(encoded, ValueError) or not len(encoded[0]):
            error = _unusable(encoded if isinstance(encoded, ValueError) else EmptyRecord("no token is left of it"))
            bad.append((number, error.kind, error.message))
            continue
        sample_ids, sample_supervised = encoded
        sample_supervised[0] = False  # no token comes before it, from which to predict it
        ids.append(sample_ids.astype(recipe.dtype, copy=False))
        supervised.append(sample_supervised)
        index.append((len(sample_ids), np.count_nonzero(sample_supervised), number))
    return _Tokens(
        task,
        ids=np.concatenate(ids),
        supervised=np.concatenate(supervised),
        index=np.array(index, dtype=np.int64).reshape(-1, 3),
        bad=sorted(bad),
        line_count=read.count,
    )


def _parse(pairs: list[tuple[int, Any]], recipe: _Recipe) -> tuple[list[tuple[int, Sample]], list[tuple[int, str, str]]]:
    """((number, sample) pairs, bad lines) of a part; ends with the first bad one, unless such lines are skipped.

    Several records may have one number: a JSON array can stand on one line."""
    parse = find_format(recipe.format)
    samples: list[tuple[int, Sample]] = []
    bad: list[tuple[int, str, str]] = []
    for number, record in pairs:
        try:
            samples.append((number, _sample(record, parse)))
        except BadLine as error:
            bad.append((number, error.kind, error.message))
            if not recipe.skip:
                break
    return samples, bad


def _sample(record: Any, parse: Format) -> Sample:
    """A record as records() has it -> a sample. Raises BadLine."""
    if isinstance(record, BadLine):
        raise record
    value = _json(record) if isinstance(record, bytes) else record
    try:
        if value is None or value in ({}, [], ""):
            raise EmptyRecord("there is nothing in it")
        sample = parse(value)
    except (ValueError, RecursionError) as error:
        raise _unusable(error) from None
    if holds_nul(sample):
        raise BadLine(Kind.NUL, "the character U+0000 is in its text: bytes that some program took for text")
    return sample


def _json(line: bytes) -> Any:
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(Kind.UTF8, f"not valid UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        raise BadLine(Kind.JSON, f"not valid JSON ({error.msg} at column {error.pos + 1}); a line holds one sample") from None
    except ValueError as error:
        raise BadLine(Kind.JSON, f"not usable JSON ({error})") from None
    except RecursionError as error:
        raise _unusable(error) from None


def _unusable(error: ValueError | RecursionError) -> BadLine:
    """For what a format or a tokenizer refuses."""
    if isinstance(error, EmptyRecord):
        return BadLine(Kind.EMPTY, str(error))
    if isinstance(error, RecursionError | TooDeep):
        return BadLine(Kind.NESTING, "lists or objects are nested too deeply")
    if isinstance(error, UnicodeEncodeError):
        half = ord(error.object[error.start])
        return BadLine(Kind.CONVERSATION, f"the text holds half a surrogate pair (\\u{half:04x}), which is no character")
    return BadLine(Kind.CONVERSATION, str(error))


class _Writer:
    """Writes the files of a cache into `directory`."""

    def __init__(self, directory: Path, files: list[Path], recipe: _Recipe, key: str) -> None:
        self.directory, self.files, self.recipe, self.key = directory, files, recipe, key
        self.sample_counts = [0] * len(files)
        self.skipped: list[tuple[int, int, str, str]] = []
        self.tokens = 0
        self.largest_id = 0

    @property
    def samples(self) -> int:
        return sum(self.sample_counts)

    def write(self, parts: Iterable[_Tokens]) -> None:
        """Write all parts, which come in order. DataError at the first bad line, unless such lines are skipped, and where nothing is left."""
        lines_before = [0] * len(self.files)
        with ExitStack() as stack:
            ids, supervised, index = (stack.enter_context((self.directory / name).open("wb")) for name in BINARIES)
            for part in parts:
                number = part.task.file_number
                for line, kind, message in part.bad:
                    self._bad_line(number, lines_before[number] + line, kind, message)
                part.index[:, 2] += lines_before[number]
                ids.write(part.ids.data)
                supervised.write(part.supervised.data)
                index.write(part.index.data)
                self.sample_counts[number] += len(part.index)
                self.tokens += len(part.ids)
                self.largest_id = max(self.largest_id, int(part.ids.max(initial=0)))
                lines_before[number] += part.line_count
        if not self.samples:
            first = (
                f" ({len(self.skipped)} skipped; the first, {unit(self.files[self.skipped[0][0]])} {self.skipped[0][1]}: {self.skipped[0][3]})"
                if self.skipped
                else ""
            )
            raise DataError(f"{self.key}: no usable line in {', '.join(map(str, self.files))}{first}")

    def finish(self, fingerprint: str) -> None:
        """Write meta.json."""
        meta = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "dtype": np.dtype(self.recipe.dtype).name,
            "samples": self.samples,
            "tokens": self.tokens,
            "largest_id": self.largest_id,
            "sizes": {name: (self.directory / name).stat().st_size for name in BINARIES},
            "hashes": {name: hash_file(self.directory / name) for name in BINARIES},
            "files": [str(file) for file in self.files],
            "sample_counts": self.sample_counts,
            "skipped": self.skipped,
        }
        write_json(self.directory / "meta.json", {**meta, "checksum": _checksum(meta)})

    def _bad_line(self, file_number: int, line: int, kind: str, message: str) -> None:
        if not self.recipe.skip:
            raise DataError(
                f"{self.key}: {self.files[file_number]} {unit(self.files[file_number])} {line}: {message}.\n"
                "Set data.bad_lines=skip to leave such lines out; they are counted and listed in the run directory."
            )
        self.skipped.append((file_number, line, kind, message))


def _parts(files: list[Path], recipe: _Recipe, num_workers: int | None, progress: bool) -> Generator[_Tokens]:
    """Every part of every file, tokenised, in order; in this process where there is little to do."""
    from tqdm import tqdm

    tokenize = partial(_tokenize, recipe)
    tasks = (_Task(number, part) for number, file in enumerate(files) for part in split(file, CHUNK_BYTES))
    total = sum(file.stat().st_size for file in files)
    workers = cores() if num_workers is None else num_workers
    parts = (
        map(tokenize, tasks)
        if workers < 2 or total < SERIAL_BYTES
        else _in_processes(tokenize, tasks, min(workers, -(-total // CHUNK_BYTES)))
    )
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None if progress else True, file=sys.stderr) as bar:
        for part in parts:
            yield part
            bar.update(part.task.part.size)


def _in_processes(tokenize: Callable[[_Task], _Tokens], tasks: Iterator[_Task], workers: int) -> Iterator[_Tokens]:
    """`map(tokenize, tasks)` by processes. ConfigError when one of them dies, or cannot be started."""
    try:
        yield from map_in_processes(tokenize, tasks, workers)
    except (ProcessDied, MemoryError) as error:
        what = "ran out of memory" if isinstance(error, MemoryError) else str(error)
        why = f"a process that tokenises {what}; set fewer, or 0 to tokenise in the main process"
        raise ConfigError("data.num_workers", workers, why) from None


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, gone afterwards. ConfigError where it cannot be written."""
    staging = _aside(directory)
    try:
        staging.mkdir(parents=True)
        _remove_stale(directory.parent)
        yield staging
    except OSError as error:
        raise ConfigError(
            "data.cache_dir", directory.parent, f"cannot be written ({error.strerror or error}); choose another directory"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, directory: Path) -> bool:
    """Give `staging` its final name; False where another process was faster. A broken cache of that name makes way."""
    sync_tree(staging)
    while True:
        try:
            staging.rename(directory)
            sync(directory.parent)
            return True
        except OSError:
            if not directory.exists():
                raise
        try:
            _valid_meta(directory, verify=True)
            return False
        except CacheError:
            broken = _aside(directory)
            with suppress(FileNotFoundError):  # another process moved it away
                directory.rename(broken)
            shutil.rmtree(broken, ignore_errors=True)


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")


def _remove_stale(cache_dir: Path) -> None:
    for path in cache_dir.glob(".*.tmp"):
        with suppress(OSError):  # another process was faster
            touched = max(one.stat().st_mtime for one in (path, *path.iterdir()))  # a file that grows does not touch its directory
            if time.time() - touched > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _fingerprint(files: list[str], recipe: _Recipe) -> str:
    """files: of each, how it is read and its hash."""
    parts = [VERSION, format_identity(recipe.format), recipe.tokenizer.fingerprint, recipe.skip, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def hash_file(file: Path) -> str:
    """SHA-256 of a file's content. A sweep prepares many jobs on the same files, so one that has not changed is read once a process."""
    stat = file.stat()
    return _hash_content(file, stat.st_size, stat.st_mtime_ns)


@cache
def _hash_content(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamps(files: list[Path]) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)]
