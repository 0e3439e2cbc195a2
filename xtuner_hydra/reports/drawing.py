"""How a sweep is drawn, both on its page and in its picture: which chart suits it, and the colours and places of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from xtuner_hydra.reports.curves import Scale
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.results.sweep import Setting

BEST = 1
"""Number of the colour (orange) that marks the best setting among grey or blue ones."""
ENDS = {"failed": "x", "killed": "x", "interrupted": "x", "pruned": "|", "running": "o"}
"""State of a job -> the sign at the end of its curve."""


@dataclass(frozen=True)
class MetricScale:
    """A map from settings to the unit interval, by the metric. low, high: its ends."""

    low: float
    high: float
    lower_is_better: bool

    @classmethod
    def of(cls, findings: Findings) -> MetricScale:
        """Over all jobs, without those that are far on the bad side, which would squeeze the others together."""
        lower_is_better = findings.result.plan.direction == "minimize"
        values = [value for setting in findings.ranked for value in setting.values]
        values += [setting.stopped for setting in findings.stopped if setting.stopped is not None]
        if not values:
            return cls(0.0, 1.0, lower_is_better)
        low, high, middle = min(values), max(values), median(values)
        if lower_is_better:
            high = min(high, middle + 4 * (middle - low)) if middle > low else high
        else:
            low = max(low, middle - 4 * (high - middle)) if high > middle else low
        return cls(low, high, lower_is_better)

    def place(self, setting: Setting) -> float:
        """The place of the setting's mean (or last value, if it was stopped), 0 (low) to 1."""
        value = setting.stopped if setting.mean is None else setting.mean
        return 0.5 if value is None or self.high == self.low else min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def goodness(self, setting: Setting) -> float:
        """1 for the best, 0 for the worst."""
        return 1 - self.place(setting) if self.lower_is_better else self.place(setting)


def grid(findings: Findings) -> tuple[list[Any], list[Any]] | None:
    """(values of the first key, values of the second) if two keys were swept and make a grid that is mostly filled."""
    if len(findings.keys) != 2:
        return None
    first, second = (list(Scale.of(findings.at(setting, key) for setting in findings.settings).values) for key in findings.keys)
    return (first, second) if len(first) * len(second) <= 2 * len(findings.settings) and len(first) <= 14 and len(second) <= 14 else None


def is_parallel(findings: Findings) -> bool:
    """Whether the swept keys need parallel coordinates to be shown together."""
    return len(findings.keys) > 1 and not grid(findings)


def colours(findings: Findings, most: int) -> tuple[dict[int, int | None], list[tuple[int | None, str]]]:
    """(job number -> number of its colour, the legend): a colour for each value of the key that matters most. If there are more than `most`
    values, or if parallel coordinates are shown above: BEST for the best setting, as there, and None for the others."""
    key = findings.telling_keys[0] if findings.keys else None
    values = list(Scale.of(findings.at(setting, key) for setting in findings.settings).values) if key else []
    if key and 1 < len(values) <= most and not is_parallel(findings):
        numbers = {job.number: values.index(findings.at(setting, key)) for setting in findings.settings for job in setting.jobs}
        return {**numbers}, [(place, f"{findings.short[key]} {findings.text(key, value)}") for place, value in enumerate(values)]
    if len(findings.settings) == 1:
        return dict.fromkeys((job.number for job in findings.result.jobs), 0), []
    best = {job.number for job in findings.best.jobs} if findings.best else set()
    entries: list[tuple[int | None, str]] = [(BEST, "best"), (None, "others")] if best else []
    return {job.number: BEST if job.number in best else None for job in findings.result.jobs}, entries
