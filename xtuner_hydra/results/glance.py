"""A run at a glance: its state and its last metrics, without reading all its rows. For lists of hundreds of runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from xtuner_hydra import run_dir
from xtuner_hydra.config.strict import flatten, refuse_non_data
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.tracking.base import Row

_TAIL = 1 << 18
"""Bytes of metrics.jsonl that are read if status.json has no final metrics: hundreds of rows."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Glance:
    """What `directory` held when it was looked at.

    state: a run's (see Run.state), or `damaged`. metrics: the last value of each. values: the config by full key, as config.yaml has it.
    damage: why the run cannot be read, None if it can."""

    directory: Path
    state: str
    step: int
    total_steps: int | None
    overrides: list[str]
    metrics: Row
    values: dict[str, Any]
    error: str | None
    damage: str | None = None


def glance(directory: Path) -> Glance:
    """Look at a run directory. Raises nothing for a damaged one."""
    try:
        return _glance(directory)
    except (RefusedError, OSError, ValueError, TypeError, AttributeError) as error:
        return _damaged(directory, " ".join(str(error).split()) or type(error).__name__)


def progress(directory: Path) -> dict[str, Any]:
    """`step`, `total_steps` and `metrics` of a run that can no longer report them itself, as far as status.json and metrics.jsonl have them."""
    status = run_dir.read_status(directory)
    known: dict[str, Any] = {key: status[key] for key in ("step", "total_steps", "metrics") if key in status}
    try:
        metrics = _last_metrics(directory / "metrics.jsonl")
    except (OSError, ValueError, TypeError, AttributeError):
        return known
    return known | {"step": metrics.get("train/step", known.get("step", 0)), "metrics": metrics} if metrics else known


def _glance(directory: Path) -> Glance:
    run_dir.refuse_stray(directory)
    status = run_dir.read_status(directory)
    if not status.get("state"):
        return _damaged(directory, "status.json is missing or cannot be read")
    # a sweep's job that was rejected before its directory was filled has only a status, with its overrides
    overrides, config = status.get("overrides"), {}
    if overrides is None:
        overrides, config = run_dir.read_overrides(directory), _config(directory)
    metrics = status.get("metrics") or _last_metrics(directory / "metrics.jsonl")
    return Glance(
        directory,
        run_dir.state_of(directory, status),
        max(int(metrics.get("train/step") or 0), int(status.get("step") or 0)),
        status.get("total_steps"),
        [str(override) for override in overrides],
        metrics,
        flatten(config),
        status.get("error"),
    )


def _damaged(directory: Path, why: str) -> Glance:
    return Glance(directory, "damaged", 0, None, [], {}, {}, None, why)


def _config(directory: Path) -> dict[str, Any]:
    try:
        text = (directory / "config.yaml").read_text(encoding="utf-8")
        refuse_non_data(text)
        config = yaml.load(text, _LOADER)
    except (OSError, YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ValueError("config.yaml is missing or cannot be read")
    return config


def _last_metrics(path: Path) -> Row:
    """The last value of every metric among the last rows, left out if null."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    whole = [line for line in lines[size > _TAIL :] if line.endswith(b"\n")]
    last: Row = {}
    for line in whole:
        last |= json.loads(line)
    return {name: value for name, value in last.items() if value is not None}
