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
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.data.bad_lines import Skipped
from xtuner_hydra.data.own_format import format_identity
from xtuner_hydra.data.readers import reading, unit
from xtuner_hydra.data.tokenising import Recipe, Tokens, tokenised_parts
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.errors import ConfigError, DataError, RefusedError
from xtuner_hydra.files import sync, sync_tree, write_json

VERSION = 9
"""Raise it when the files of a cache change, or what a format reads from a line."""

BINARIES = ("ids.bin", "supervised.bin", "index.bin")

STALE_SECONDS = 24 * 3600
"""A staging directory untouched for so long was left by a process that was killed."""

log = logging.getLogger("xtuner_hydra")


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
    format_key: str = "data.format",
) -> TokenCache:
    """Open the cache of `files`, or make it.

    num_workers: processes that tokenise (None: one a core). progress: show a bar where stderr is a terminal. key, format_key: the config's keys
    of `files` and `format`, for messages.
    Raises DataError for a line that cannot be used (unless bad_lines is `skip`) and where none can; ConfigError where `cache_dir` cannot be
    written or `format` not be imported. Nothing is left behind then."""
    stamps = _stamps(files)
    recipe = Recipe(format, tokenizer, skip=bad_lines == "skip", format_key=format_key)
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
        with closing(tokenised_parts(files, recipe, num_workers, progress)) as parts:
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


class _Writer:
    """Writes the files of a cache into `directory`."""

    def __init__(self, directory: Path, files: list[Path], recipe: Recipe, key: str) -> None:
        self.directory, self.files, self.recipe, self.key = directory, files, recipe, key
        self.sample_counts = [0] * len(files)
        self.skipped: list[tuple[int, int, str, str]] = []
        self.tokens = 0
        self.largest_id = 0

    @property
    def samples(self) -> int:
        return sum(self.sample_counts)

    def write(self, parts: Iterable[Tokens]) -> None:
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


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, gone afterwards. ConfigError where it cannot be written, DataError where it is another file that fails."""
    staging = _aside(directory)
    try:
        staging.mkdir(parents=True)
        _remove_stale(directory.parent)
        yield staging
    except OSError as error:
        if error.filename is not None and directory.parent not in Path(os.fsdecode(error.filename)).parents:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
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


def _fingerprint(files: list[str], recipe: Recipe) -> str:
    """files: of each, how it is read and its hash."""
    parts = [VERSION, format_identity(recipe.format, recipe.format_key), recipe.tokenizer.fingerprint, recipe.skip, files]
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
