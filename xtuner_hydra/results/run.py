"""A run to read: its directory's files as one object. Knows nothing of torch or Hydra, so it is quick to import."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from yaml import YAMLError

from xtuner_hydra import run_dir
from xtuner_hydra.config.schema import Config
from xtuner_hydra.config.strict import flatten, from_yaml
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.tracking import jsonl
from xtuner_hydra.tracking.base import Row, Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What `directory` held when it was read.

    status: status.json. overrides: what was typed. environment: environment.json. rows: metrics.jsonl, training steps and evaluations mixed."""

    directory: Path
    config: Config
    overrides: list[str]
    status: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def state(self) -> str:
        """running, completed, failed, interrupted; `killed` if the run says running but its process is gone; `pruned` if a sweep stopped it."""
        return run_dir.state_of(self.directory, self.status)

    @cached_property
    def train(self) -> dict[str, np.ndarray]:
        """Metrics of the training steps as columns, float64 (rows,), NaN where a row has none: `pandas.DataFrame(run.train)`."""
        return _columns([row for row in self.rows if "train/loss" in row])

    @cached_property
    def eval(self) -> dict[str, np.ndarray]:
        """Metrics of the evaluations, likewise."""
        return _columns([row for row in self.rows if "eval/loss" in row])

    @cached_property
    def final(self) -> dict[str, float | int]:
        """The last value of every metric, left out if null; without metrics.jsonl, those in status.json."""
        last: Row = {}
        for row in (self.status.get("metrics") or {}, *self.rows):
            last |= row
        return {name: value for name, value in last.items() if value is not None}

    @property
    def step(self) -> int:
        """Steps done, whether their metrics were logged or not."""
        return max(int(self.final.get("train/step", 0)), int(self.status.get("step") or 0))

    @property
    def seconds(self) -> float | None:
        """From its start (the last one, if it was resumed) to its end, or to its last metrics if it did not reach its end. None if either
        is unknown."""
        try:
            end = self.status["time"]
            if self.status["state"] == "running":
                with suppress(FileNotFoundError):
                    end = max(end, (self.directory / "metrics.jsonl").stat().st_mtime)
            return max(0.0, end - datetime.fromisoformat(self.environment["time"]).timestamp())
        except (KeyError, ValueError):
            return None

    @property
    def total_steps(self) -> int | None:
        """Steps planned."""
        return self.status.get("total_steps")

    @cached_property
    def values(self) -> dict[str, Any]:
        """The config by full key: `optimizer.lr`."""
        return flatten(asdict(self.config))

    @cached_property
    def samples(self) -> list[Sample]:
        """samples.jsonl: the answers to trainer.sample_prompts, in the order in which they were given; empty if there are none."""
        return _read("samples.jsonl", self.directory, lambda path: jsonl.read(path / "samples.jsonl"))

    @cached_property
    def data(self) -> dict[str, Any]:
        """data.json: files, fingerprints, token caches, counts; empty if the run has none (yet)."""
        return _json(self.directory / "data.json")


def load_run(directory: str | os.PathLike[str]) -> Run:
    """Read the run directory `directory`, whatever its state. Raises RefusedError if it holds none, or one that cannot be read."""
    path = Path(directory).expanduser().resolve()
    if not (path / "config.yaml").is_file():
        sweep = "; it is a sweep, and its runs are the directories in it" if (path / "sweep.json").is_file() else ""
        raise RefusedError(f"{directory}: not a run directory (it has no config.yaml){sweep}")
    run_dir.refuse_stray(path)
    return Run(
        path,
        _read("config.yaml", path, lambda path: copy.deepcopy(_config((path / "config.yaml").read_text(encoding="utf-8")))),
        _read("overrides.yaml", path, run_dir.read_overrides),
        _read("status.json", path, run_dir.read_status),
        _json(path / "environment.json"),
        _read("metrics.jsonl", path, lambda path: jsonl.read(path / "metrics.jsonl")),
    )


def find_runs(directories: Iterable[Path], *, damaged: bool = False) -> Iterator[Path]:
    """Run directories at or below `directories`, each once, in the order of their paths (which begin with their time).

    damaged: also what is left of runs that lack their config.yaml or status.json."""
    seen = set()
    for top in directories:
        for root, names, files in os.walk(top):
            names.sort()
            if {"config.yaml", "status.json"} <= set(files) or (damaged and _was_run(files)):
                names.clear()  # a run holds no runs
                if (path := Path(root).resolve()) not in seen:
                    seen.add(path)
                    yield path


def _was_run(files: list[str]) -> bool:
    """A sweep's job that was rejected has only a status; config.yaml alone is too common a name to identify a run."""
    return "status.json" in files or {"config.yaml", "overrides.yaml"} <= set(files)


def _read(name: str, directory: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(directory)
    except (RefusedError, OSError, ValueError, YAMLError) as error:
        raise RefusedError(f"{directory}: {name} cannot be read: {' '.join(str(error).split())}") from None


@lru_cache(maxsize=1024)
def _config(text: str) -> Config:
    """A config.yaml, which takes 30 ms to check; a sweep's report rereads those of all jobs after every job."""
    return from_yaml(text)


def _columns(rows: list[Row]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=float) for name in names}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no JSON, or not even UTF-8
        return {}
    return found if isinstance(found, dict) else {}
