"""What a sweep varies: from overrides with several values to parameters, and from parameters to the jobs of a grid or a zipped list.

optimizer.lr=1e-5,6e-5    choice(1e-5,6e-5)    range(1,4)        values, for every search
optimizer.lr=interval(1e-6,1e-3)    tag(log, interval(...))      a range, only for random and bayes
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from xtuner_hydra.app import App
from xtuner_hydra.config.schema import SweepConfig
from xtuner_hydra.config.strict import is_whole
from xtuner_hydra.errors import RefusedError


@dataclass(frozen=True)
class Parameter:
    """A swept key. Either `values`, as texts to put after `key=`, or an `interval` from low to high (of whole numbers if both are int)."""

    key: str
    values: tuple[str, ...] = ()
    interval: tuple[float, float] | None = None
    log: bool = False

    @property
    def ends(self) -> list[str]:
        """All values, or the two ends: these must be valid for the search to start."""
        return list(self.values) if self.interval is None else [_text(end) for end in self.interval]


def split(app: App, sweep: SweepConfig) -> tuple[list[str], list[Parameter]]:
    """(the overrides that all jobs share, what is swept) from the command line and sweep.params. Raises RefusedError."""
    typed = [override for override in app.check_overrides(app.overrides) if not _speaks_to_hydra(override)]
    keys = {override.key_or_group for override in typed}
    preset = app.check_overrides([f"{key}={_yaml_text(value)}" for key, value in sweep.params.items() if key not in keys])
    for override in preset:
        if not override.is_sweep_override():
            raise RefusedError(
                f"sweep.params: {override.input_line}: one value; a sweep takes several, with commas, or an interval(low, high)"
            )
    swept = [one for one in [*typed, *preset] if one.is_sweep_override()]
    for one in swept:
        if sum(other.key_or_group == one.key_or_group for other in typed) > 1:
            raise RefusedError(f"{one.key_or_group}: is given twice; a sweep takes all values in one place, with commas")
    return fixed_overrides(app), [_parameter(override, sweep.search) for override in swept]


def fixed_overrides(app: App) -> list[str]:
    """The overrides that all jobs share. A job is what it would be alone: the sweep's own keys are left out, anything else its preset sets is in."""
    typed = [override for override in app.check_overrides(app.overrides) if not _speaks_to_hydra(override)]
    keys = {override.key_or_group for override in typed}
    fixed = [str(one.input_line) for one in typed if not one.is_sweep_override() and not one.key_or_group.startswith("sweep")]
    return [*(f"{key}={text}" for key, text in app.sweep_preset().items() if key not in keys), *fixed]


def jobs(parameters: Sequence[Parameter], search: str) -> list[list[str]]:
    """The swept overrides of every job of a grid (the last parameter varies fastest) or of a zipped list. Raises RefusedError."""
    columns = [[f"{parameter.key}={value}" for value in parameter.values] for parameter in parameters]
    if search == "grid":
        return [list(job) for job in itertools.product(*columns)]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{parameter.key} {len(parameter.values)}" for parameter in parameters)
        raise RefusedError(f"sweep.search=zip: pairs the first values, then the second ones, but the numbers of values differ: {lengths}")
    return [list(job) for job in zip(*columns, strict=True)]


def corners(parameters: Sequence[Parameter]) -> list[list[str]]:
    """Overrides that try every value, and both ends of every interval, at least once."""
    most = max((len(parameter.ends) for parameter in parameters), default=0)
    return [[f"{one.key}={one.ends[min(i, len(one.ends) - 1)]}" for one in parameters] for i in range(most)]


def _parameter(override: Override, search: str) -> Parameter:
    key, value = str(override.get_key_element()), override.value()
    if _speaks_to_hydra(override) or override.key_or_group.startswith("sweep"):
        raise RefusedError(f"{override.input_line}: only the config of a job can be swept")
    if isinstance(value, IntervalSweep):
        if search not in ("random", "bayes"):
            raise RefusedError(f"{override.input_line}: an interval has no list of values; add sweep.search=random or sweep.search=bayes")
        assert value.start is not None
        assert value.end is not None
        log, (low, high) = "log" in value.tags, (value.start, value.end)
        if low >= high or (log and low <= 0):
            raise RefusedError(
                f"{override.input_line}: an interval goes from a lower to a higher number{', above 0 for log' if log else ''}"
            )
        if is_whole(override.key_or_group) and low == int(low) and high == int(high):  # Hydra makes both floats
            low, high = int(low), int(high)
        return Parameter(key, interval=(low, high), log=log)
    if isinstance(value, RangeSweep) and not value.step:
        raise RefusedError(f"{override.input_line}: the step of a range cannot be 0")
    values = tuple(override.sweep_string_iterator())
    if not values:
        raise RefusedError(f"{override.input_line}: holds no value")
    return Parameter(key, values)


def _speaks_to_hydra(override: Override) -> bool:
    return override.key_or_group.startswith(("hydra.", "hydra/"))


def _yaml_text(value: object) -> str:
    """A value of sweep.params as on the command line: `[1, 2]` is a list of values too."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else repr(float(number))
