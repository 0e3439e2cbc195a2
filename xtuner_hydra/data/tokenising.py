"""The records of files -> token ids and supervision, in parts, by several processes where there is much of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.data.bad_lines import BadLine, Kind
from xtuner_hydra.data.formats import PARSERS, EmptyRecord, Format, Sample, fitting, holds_nul
from xtuner_hydra.data.own_format import find_format
from xtuner_hydra.data.processes import ProcessDied, map_in_processes
from xtuner_hydra.data.readers import DECODER, Part, records, split
from xtuner_hydra.data.tokenizers import Tokenizer, TooDeep
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.machine import cores

CHUNK_BYTES = 4 << 20
SERIAL_BYTES = 32 << 20
"""Below this many bytes of data, starting processes costs more time than they save."""


@dataclass(frozen=True)
class Recipe:
    """How a worker makes samples of lines. skip: go on after a bad line. format_key: the config's key of `format`."""

    format: str
    tokenizer: Tokenizer
    skip: bool
    format_key: str = "data.format"

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class Task:
    """A part of a file, for a worker to tokenise."""

    file_number: int
    part: Part


@dataclass(frozen=True)
class Tokens:
    """What a worker makes of its part. index: int64 (samples, 3) as in index.bin; line numbers count from 1 at the part's start."""

    task: Task
    ids: NDArray[np.unsignedinteger]
    supervised: NDArray[np.bool_]
    index: NDArray[np.int64]
    bad: list[tuple[int, str, str]]
    line_count: int


def tokenised_parts(files: list[Path], recipe: Recipe, num_workers: int | None, progress: bool) -> Generator[Tokens]:
    """Every part of every file, tokenised, in order; in this process where there is little to do."""
    from tqdm import tqdm

    work = partial(tokenize, recipe)
    tasks = (Task(number, part) for number, file in enumerate(files) for part in split(file, CHUNK_BYTES))
    total = sum(file.stat().st_size for file in files)
    workers = cores() if num_workers is None else num_workers
    parts = map(work, tasks) if workers < 2 or total < SERIAL_BYTES else _in_processes(work, tasks, min(workers, -(-total // CHUNK_BYTES)))
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None if progress else True, file=sys.stderr) as bar:
        for part in parts:
            yield part
            bar.update(part.task.part.size)


def tokenize(recipe: Recipe, task: Task) -> Tokens:
    """What is in a part. Runs in a worker."""
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
    return Tokens(
        task,
        ids=np.concatenate(ids),
        supervised=np.concatenate(supervised),
        index=np.array(index, dtype=np.int64).reshape(-1, 3),
        bad=sorted(bad),
        line_count=read.count,
    )


def _parse(pairs: list[tuple[int, Any]], recipe: Recipe) -> tuple[list[tuple[int, Sample]], list[tuple[int, str, str]]]:
    """((number, sample) pairs, bad lines) of a part; ends with the first bad one, unless such lines are skipped.

    Several records may have one number: a JSON array can stand on one line."""
    parse = find_format(recipe.format, recipe.format_key)
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
        bad = _unusable(error)
        fits = [name for name in fitting(value) if parse is not PARSERS[name]]
        hint = f"; data.format={fits[0]} reads such a record" if bad.kind == Kind.CONVERSATION and fits else ""
        raise BadLine(bad.kind, bad.message + hint) from None
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
        return BadLine(Kind.CONVERSATION, f"the text holds half a surrogate pair (\\u{half:04x}), which is not a character")
    return BadLine(Kind.CONVERSATION, str(error))


def _in_processes(work: Callable[[Task], Tokens], tasks: Iterator[Task], workers: int) -> Iterator[Tokens]:
    """`map(work, tasks)` by processes. ConfigError when one of them dies, or cannot be started."""
    try:
        yield from map_in_processes(work, tasks, workers)
    except (ProcessDied, MemoryError) as error:
        what = "ran out of memory" if isinstance(error, MemoryError) else str(error)
        why = f"a process that tokenises {what}; set fewer, or 0 to tokenise in the main process"
        raise ConfigError("data.num_workers", workers, why) from None
