"""The commands that a sweep's reader wants next: continue the sweep, repeat the best job, and look closer around it."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from xtuner_hydra import words
from xtuner_hydra.config.names import as_typed, split_override
from xtuner_hydra.config.schema import Config
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.results.sweep import SEED, JobResult, SweepPlan, SweepResult

PROGRAM = "python -m xtuner_hydra"
MOST_JOBS = 27
"""A refinement that would exceed this number varies fewer keys."""
NEAR = 1.3


def repeat(result: SweepResult, job: JobResult) -> str:
    """The command that runs `job` again, on its own."""
    return alone(result.plan, _overrides(job))


def alone(plan: SweepPlan, overrides: Sequence[str]) -> str:
    """The command that runs a job with `overrides` outside its sweep."""
    return _command(plan, [override for override in overrides if not _is_of_sweep(override)])


def resume(result: SweepResult) -> str | None:
    """The command that continues the sweep; None if nothing is left to do, or if runs were only put side by side."""
    left = result.plan.total - result.count("completed", "pruned")
    return " ".join([PROGRAM, as_typed("sweep.resume", result.directory)]) if result.plan.state and left > 0 else None


def refine(result: SweepResult, best: JobResult, keys: Sequence[str]) -> tuple[str, int] | None:
    """A finer grid around `best` with the seeds of the sweep, and its number of jobs; None if no swept key is a number. keys: the swept ones, the
    most influential first; if the grid would exceed MOST_JOBS, the last keys stay at their best value, and then the last seeds are left out."""
    values = {key: around(best.swept[key], _seen(result, key)) for key in keys if key in best.swept}
    values = {key: near for key, near in values.items() if len(near) > 1}  # numbers, so keys of the schema and not groups
    if best.run:
        allowed = {key: [value for value in near if _is_allowed(best.run.config, key, value)] for key, near in values.items()}
        values = {key: near for key, near in allowed.items() if len(near) > 1}
    seeds = sorted({job.swept[SEED] for job in result.jobs if SEED in job.swept})
    while len(values) > 1 and math.prod(map(len, values.values())) * max(1, len(seeds)) > MOST_JOBS:
        values.popitem()
    if not values:
        return None
    base = [override for override in _overrides(best) if not _is_of_sweep(override) and split_override(override)[0] not in {*values, SEED}]
    if seeds:
        values[SEED] = seeds[: MOST_JOBS // math.prod(map(len, values.values()))]
    grid = [f"{key}={','.join(map(words.exact, near))}" for key, near in values.items()]
    decides = [override for override in result.plan.overrides if split_override(override)[0] in ("sweep.metric", "sweep.direction")]
    return _command(result.plan, ["-m", *base, *decides, *grid]), math.prod(map(len, values.values()))


def _is_allowed(config: Config, key: str, value: Any) -> bool:
    """Whether `value` is in the range that the schema gives `key`."""
    *groups, name = key.split(".")
    try:
        replace(functools.reduce(getattr, groups, config), **{name: value})
    except ConfigError:
        return False
    return True


def around(best: Any, seen: Sequence[Any]) -> list[Any]:
    """Values of a key between the best one and its neighbours among those `seen`; [best] if it is not a number.

    Whole numbers: the midpoints. Others: half-way by ratio (by difference if one is not positive). At an edge of what was seen, half or
    twice the best, as the optimum may be beyond. Values within a factor of NEAR are not neighbours: one in between would add nothing."""
    if isinstance(best, bool) or not isinstance(best, int | float) or best == 0:
        return [best]
    others = {value for value in seen if isinstance(value, int | float) and not isinstance(value, bool)} - {best}
    if not others:
        return [best]
    numbers = sorted({value for value in others if not _is_near(value, best)} | {best})
    place = numbers.index(best)
    apart = max(1, len(numbers) // 6)  # of values drawn at random the nearest are too near to be informative
    low = _between(numbers[max(0, place - apart)], best) if place else _round(best, best * 0.5)
    high = _between(best, numbers[min(place + apart, len(numbers) - 1)]) if place + 1 < len(numbers) else _round(best, best * 2)
    return sorted({low, best, high})


def _is_near(value: float, best: float) -> bool:
    return value > 0 and best > 0 and max(value, best) < NEAR * min(value, best)


def _between(low: float, high: float) -> float:
    middle = math.sqrt(low * high) if low > 0 and not (isinstance(low, int) and isinstance(high, int)) else (low + high) / 2
    return _round(low if isinstance(low, int) else high, middle)


def _round(like: float, number: float) -> float:
    """To a whole number if `best` is one, else to two digits."""
    return round(number) if isinstance(like, int) else float(f"{number:.2g}")


def _seen(result: SweepResult, key: str) -> list[Any]:
    """Values of the jobs that trained at all; a rate at which training fails is not a useful neighbour."""
    return [job.swept[key] for job in result.jobs if key in job.swept and job.state != "failed"]


def _overrides(job: JobResult) -> list[str]:
    return job.run.overrides if job.run else job.job.overrides


def _is_of_sweep(override: str) -> bool:
    """Whether an override concerns the sweep or Hydra, not the job."""
    return split_override(override)[0].partition(".")[0].partition("/")[0] in ("sweep", "hydra")


def _command(plan: SweepPlan, arguments: list[str]) -> str:
    directory = ["--config-dir", plan.config_dir] if plan.config_dir else []
    name = ["--config-name", plan.config_name] if plan.config_name else []
    return " ".join([PROGRAM, *map(shlex.quote, [*directory, *name, *arguments])])
