"""metrics.jsonl, and samples.jsonl beside it: one JSON object per line, flushed at once. Every other view is made from them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner_hydra.errors import TrainingError
from xtuner_hydra.files import finite, write_text
from xtuner_hydra.tracking.base import Row, Sample

log = logging.getLogger("xtuner_hydra")


class _Lines:
    """A file that grows by a line at a time; a resumed run continues after `start_step`. finished: whether what follows that step has been done."""

    required = True

    def __init__(self, path: Path, start_step: int, *, finished: bool = True) -> None:
        truncate_after(path, start_step, finished=finished)
        self.file = path.open("a", encoding="utf-8")

    def append(self, value: dict[str, Any]) -> None:
        """Append `value`. Raises TrainingError if it cannot be written."""
        try:
            self.file.write(json.dumps(finite(value), allow_nan=False, ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise TrainingError(f"{self.file.name}: {error.strerror}; metrics cannot be written; stopping") from None

    def finish(self, state: str, exit_code: int) -> None:
        """Close the file."""
        self.file.close()


class JsonlTracker(_Lines):
    """Appends rows at full precision; NaN and infinities become null, which every JSON parser reads."""

    def log(self, row: Row) -> None:
        """Append `row`."""
        self.append(row)

    def show(self, samples: list[Sample]) -> None:
        """Nothing: samples have their own file."""


class SampleTracker(_Lines):
    """Appends samples."""

    def log(self, row: Row) -> None:
        """Nothing: rows have their own file."""

    def show(self, samples: list[Sample]) -> None:
        """Append every sample."""
        for sample in samples:
            self.append(sample)


def read(path: Path) -> list[Any]:
    """The rows of a metrics.jsonl, or samples of a samples.jsonl; none if there is no such file. A last line that a crash cut short is
    left out."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class Tail:
    """Follows a metrics.jsonl that another process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.inode: int | None = None

    def read(self) -> list[Row]:
        """The rows added since the last call; all of them if a resumed run has replaced the file by a shorter one."""
        try:
            with self.path.open("rb") as file:
                if self.inode != (inode := os.fstat(file.fileno()).st_ino):
                    self.inode, self.offset = inode, 0
                file.seek(self.offset)
                whole, _, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self.offset += len(whole) + bool(whole)
        rows = (_row(line + b"\n") for line in whole.split(b"\n"))
        return [row for row in rows if row is not None]  # a resumed job warns of damaged ones and leaves them out


def _undamaged(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        row = _row(line)
        if row is not None:
            yield row
        elif line.endswith(b"\n"):  # else it was only cut short
            log.warning(f"{path}: line {number} is damaged and is left out")


def _row(line: bytes) -> Row | None:
    """The row in a line; None for a line that is damaged or cut short."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and "train/step" in row else None


def truncate_after(path: Path, step: int, *, finished: bool = True) -> None:
    """Drop the rows after `step`, which a resumed run will write again, and a line cut short; if the step is not `finished`, also what follows its
    own row: its evaluation or samples. Damaged lines, as after a power failure, are left out with a warning. Atomic."""

    def stays(row: Row) -> bool:
        place = row["train/step"] or 0
        return place < step or (place == step and (finished or "train/loss" in row))

    if path.exists():
        kept = [row for row in _undamaged(path) if stays(row)]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
