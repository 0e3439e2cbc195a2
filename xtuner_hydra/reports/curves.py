"""Curves for drawing: smoothed, thinned out, with sensible ends and ticks. Nothing here knows how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from xtuner_hydra import words
from xtuner_hydra.results.run import Run

TOKENS = "train/total_tokens"
SMOOTH_FROM = 60
"""Points; a curve with fewer is clearer as it is."""
_SHORTEST = 6
"""Letters of a name on an axis."""
_ALIKE = 1e-6
"""A range that is a smaller share of its values counts as none."""
POINTS = 160
"""A curve is drawn with about this many points."""


@dataclass(frozen=True)
class Curve:
    """y over x, both float64 (points,), finite and in the order of the steps."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def curve(run: Run, metric: str) -> Curve:
    """`metric` of a run over the tokens trained on; empty if the run has none. Values that are not finite are left out."""
    columns = run.eval if metric.startswith("eval/") else run.train
    if metric not in columns or TOKENS not in columns:
        return Curve(np.empty(0), np.empty(0))
    x, y = columns[TOKENS], columns[metric]
    good = np.isfinite(x) & np.isfinite(y)
    return Curve(x[good], y[good])


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Mean over a window of `share` of the values, centred, narrower at the ends."""
    half = max(1, int(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def smoothed(line: Curve, share: float = 0.02) -> Curve:
    """The curve without its noise, if it is long enough to show a trend."""
    return Curve(line.x, smooth(line.y, share)) if len(line) >= SMOOTH_FROM else line


def thinned(line: Curve, points: int = POINTS) -> Curve:
    """About `points` points of the curve at most, including the first and last. In each stretch the lowest and the highest point are kept, so that
    a spike in one step of ten thousand is still visible."""
    if len(line) <= points:
        return line
    edges = np.linspace(0, len(line), points // 2 + 1).astype(int)
    kept = {0, len(line) - 1}
    for start, stop in pairwise(edges):
        part = line.y[start:stop]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    index = np.array(sorted(kept))
    return Curve(line.x[index], line.y[index])


def inside(line: Curve, low: float, high: float) -> list[Curve]:
    """The parts of the curve with y from `low` to `high`, each cut where it crosses the bound: clipped to it, it would look like a plateau."""
    parts: list[list[tuple[float, float]]] = []
    points = list(zip(line.x.tolist(), line.y.tolist(), strict=True))
    if len(points) == 1:
        return [line] if low <= points[0][1] <= high else []
    joined = False
    for start, stop in pairwise(points):
        if max(start[1], stop[1]) < low or min(start[1], stop[1]) > high:
            joined = False
            continue
        if not joined:
            parts.append([_towards(stop, start, low, high)])
        if (last := _towards(start, stop, low, high)) != parts[-1][-1]:
            parts[-1].append(last)
        joined = last == stop
    return [Curve(*np.array(part).T) for part in parts]


def _towards(start: tuple[float, float], stop: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """Where the line from `start`, which is inside or on the other side, to `stop` meets the bound; `stop` if it is inside."""
    bound = min(max(stop[1], low), high)
    return stop if bound == stop[1] else (stop[0] + (bound - stop[1]) / (start[1] - stop[1]) * (start[0] - stop[0]), bound)


def limits(lines: Iterable[Curve]) -> tuple[float, float]:
    """The y range that shows `lines`: all of it, unless a few points are far above the rest (a loss that exploded), which are cut off."""
    values = [line.y for line in lines if len(line)]
    if not values:
        return 0.0, 1.0
    every = np.concatenate(values)
    low, high = float(every.min()), float(every.max())
    usual = float(np.quantile(every, 0.97))
    if high - low > 4 * (usual - low) > 0:
        high = usual + 0.1 * (usual - low)
    return padded(low, high)


def padded(low: float, high: float) -> tuple[float, float]:
    """The range with a margin of 5 %; differences that are only rounding are not magnified."""
    if high - low <= _ALIKE * abs(high):
        low = high = (low + high) / 2
    margin = 0.05 * (high - low) or abs(low) * 0.05 or 0.5
    return low - margin, high + margin


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`, at most `most` of them and at least two if possible."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [0.0 if number == 0 else number * step for number in range(first, last + 1)]
    return [low, high]


@dataclass(frozen=True)
class Scale:
    """A map from values to the unit interval: linear, by ratio (`log`), or in equal steps from value to value (`places`)."""

    values: Sequence[object]
    kind: str  # linear, log, places

    @classmethod
    def of(cls, values: Iterable[object]) -> Scale:
        """The scale for a swept key: by ratio if its numbers span a factor of 8 or more, in equal steps if they are not numbers."""
        distinct = list(dict.fromkeys(values))
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
            return cls(sorted(distinct, key=str), "places")
        numbers = sorted(distinct)  # type: ignore[type-var]
        return cls(numbers, "log" if numbers[0] > 0 and numbers[-1] >= 8 * numbers[0] else "linear")  # type: ignore[operator]

    def __call__(self, value: object) -> float:
        """The place of `value`, 0 to 1; 0.5 if it is the only one."""
        if self.kind == "places":
            place, last = self.values.index(value), len(self.values) - 1
            return place / last if last else 0.5
        low, high, number = (self._plain(one) for one in (self.values[0], self.values[-1], value))
        return (number - low) / (high - low) if high > low else 0.5

    def marks(self, apart: float) -> tuple[list[float], list[str]]:
        """Places and texts of an axis's marks: the values themselves, without those nearer to the one before than `apart` or than the width of their
        texts. Names are shortened instead, if enough of them remains."""
        at: list[float] = []
        texts: list[str] = []
        told = words.apart(self.values, 2)
        room = int(1 / max(1, len(self.values) - 1) / (0.44 * apart))
        if self.kind == "places" and room >= _SHORTEST:
            told = {value: words.cut(text, room) for value, text in told.items()}
        for value in self.values:
            place, text = self(value), told[value]
            if not at or place - at[-1] >= max(apart, 0.22 * apart * (len(text) + len(texts[-1]))):
                at.append(place)
                texts.append(text)
        return at, texts

    def _plain(self, value: object) -> float:
        number = float(value)  # type: ignore[arg-type]
        return math.log(number) if self.kind == "log" else number
