"""Whether the first of a ranking is ahead of the second by more than chance.

A seed means the same initial weights and the same order of the data in every setting. So if two settings share seeds, their differences seed by
seed say more than the two means: what a seed does to both cancels (the paired t-test, Student 1908)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev

from xtuner_hydra.results.sweep import Setting

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom."""
ROUNDING = 1e-9
"""A difference that is a smaller share of the values means nothing: sums in another order differ by as much."""


def enough(freedom: int) -> float:
    """How many standard errors a difference must be to exceed the 95 % interval of chance. Above ten degrees of freedom within 0.01."""
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.6 / freedom


def pooled(settings: Sequence[Setting]) -> tuple[float | None, int]:
    """(standard deviation between jobs that differ only in their seed, its degrees of freedom), over `settings`; None if none has two seeds."""
    freedom = sum(max(0, len(setting.values) - 1) for setting in settings)
    # not squared and summed: diverged perplexities would overflow
    spreads = [math.sqrt(len(setting.values) - 1) * setting.spread for setting in settings if setting.spread is not None]
    return (math.hypot(*spreads) / math.sqrt(freedom) if freedom else None), freedom


@dataclass(frozen=True)
class Lead:
    """How far `first` is ahead of `second`. sign: 1 if low values are good, else -1. noise, freedom: as `pooled` gives them."""

    first: Setting
    second: Setting
    sign: int
    noise: float | None
    freedom: int

    @cached_property
    def size(self) -> float:
        """Between the two means, 0 or more."""
        return abs((self.first.mean or 0.0) - (self.second.mean or 0.0))

    @property
    def nothing(self) -> float:
        """A difference up to this counts as none."""
        return ROUNDING * max(map(abs, (*self.first.values, *self.second.values)))

    @cached_property
    def pairs(self) -> list[float]:
        """By how much the first is ahead on each seed that both have a value for; empty if there are fewer than two."""
        first, second = self.first.by_seed, self.second.by_seed
        ahead = [self.sign * (second[seed] - first[seed]) for seed in first if seed in second]
        return ahead if len(ahead) > 1 else []

    @property
    def spread(self) -> float:
        """Standard deviation of `pairs`; 0 if they differ only by rounding."""
        spread = stdev(self.pairs)
        return spread if spread > self.nothing else 0.0

    @cached_property
    def certainty(self) -> float | None:
        """The lead in standard errors: of the mean of `pairs`, or else of the difference of two means; None if neither is known."""
        if self.pairs:
            return self._in_errors(mean(self.pairs), self.spread / math.sqrt(len(self.pairs)))
        if self.noise is None:
            return None
        return self._in_errors(self.size, self.noise * math.sqrt(1 / len(self.first.values) + 1 / len(self.second.values)))

    def _in_errors(self, ahead: float, error: float) -> float:
        return ahead / error if error > self.nothing else math.inf if ahead > self.nothing else 0.0

    @cached_property
    def verdict(self) -> str:
        """clear: beyond the 95 % interval of chance; chance: below one standard error; unsure between. tie: none at all. unknown: one seed each."""
        if self.size <= self.nothing:
            return "tie"
        if self.certainty is None:
            return "unknown"
        freedom = len(self.pairs) - 1 if self.pairs else self.freedom
        return "clear" if self.certainty >= enough(freedom) else "unsure" if self.certainty >= 1 else "chance"
