"""Charts as inline SVG, drawn by hand: their colours are the page's, so they follow light and dark mode, and their text stays readable on a narrow
page (the style sheet enlarges it, the margins leave room). A `<title>` says what a mark is; the script in style.py shows it at the pointer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xtuner_hydra import words
from xtuner_hydra.reports.curves import Curve, Scale, inside, limits, padded, ticks
from xtuner_hydra.reports.markup import Markup, tag

WIDTH, HEIGHT = 560, 320
SMALL = (360, 240)
"""Size of a chart beside two others."""
LARGEST = 1.3
"""Largest scale of a chart; drawn larger, its letters would exceed the text around it."""
LEFT, RIGHT, TOP, BOTTOM = 66, 22, 14, 46
_LINE = 0.05
"""Height of a line of text, as a share of an upright axis."""


@dataclass(frozen=True)
class Line:
    """A curve to draw. kind: CSS classes. job: marks with the same one light up together. end: the mark at its last point (`x`, `o`, `|`, none).
    dots: points to mark."""

    curve: Curve
    title: str
    kind: str = "k0"
    job: str | None = None
    end: str = ""
    dots: Curve | None = None


@dataclass(frozen=True)
class Frame:
    """The plot's rectangle and the data range that it shows."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT

    def at_x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.height - BOTTOM - (value - low) / ((high - low) or 1) * (self.height - TOP - BOTTOM)

    def svg(self, *content: Markup | list[Markup], label: str, kind: str = "", probe: bool = False) -> Markup:
        """The chart. probe: the pointer finds the nearest curve and reads its value."""
        range_ = f"{LEFT},{self.width - RIGHT},{self.height - BOTTOM},{TOP},{self.x[0]!r},{self.x[1]!r},{self.y[0]!r},{self.y[1]!r}"
        return tag(
            "svg",
            *content,
            viewBox=f"0 0 {self.width} {self.height}",
            class_=f"chart {kind}".strip(),
            role="img",
            style=f"max-width:{round(LARGEST * self.width)}px",
            aria_label=label,
            data_range=range_ if probe else None,
        )


def lines(
    series: Sequence[Line],
    *,
    label: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Markup:
    """Curves over a common x from 0."""
    drawn = [line for line in series if len(line.curve)]
    right = max((float(line.curve.x[-1]) for line in drawn), default=1.0)
    frame = Frame((0.0, right), y_range or limits([line.curve for line in drawn]), *size)
    marks = [_line(frame, line) for line in drawn]
    grid = [*_y_axis(frame), *_x_axis(frame, ticks(0, right, max(4, size[0] // 110)), x_label)]
    return frame.svg(*grid, tag("g", marks, class_="plot"), label=label, probe=True)


def _line(frame: Frame, line: Line) -> Markup:
    seen = inside(line.curve, *frame.y) or [_at_edge(frame, line.curve)]
    parts = [tag("title", line.title), tag("path", d=_path(frame, seen), class_="line")]
    if line.dots is not None:
        parts += [
            tag("circle", cx=f"{frame.at_x(x):.1f}", cy=f"{frame.at_y(y):.1f}", r=3.4, class_="dot")
            for x, y in zip(line.dots.x, line.dots.y, strict=True)
            if frame.y[0] <= y <= frame.y[1]
        ]
    if line.end or sum(map(len, seen)) == 1:
        parts.append(_end(line.end, frame.at_x(float(seen[-1].x[-1])), frame.at_y(float(seen[-1].y[-1]))))
    return tag("g", parts, class_=f"series {line.kind}", data_job=line.job)


def _at_edge(frame: Frame, curve: Curve) -> Curve:
    """A mark for a curve that is completely outside the frame."""
    return Curve(curve.x[-1:], np.clip(curve.y[-1:], *frame.y))


def _path(frame: Frame, parts: Sequence[Curve]) -> str:
    drawn = ("L".join(f"{frame.at_x(x):.1f},{frame.at_y(y):.1f}" for x, y in zip(part.x, part.y, strict=True)) for part in parts)
    return "".join("M" + part for part in drawn)


def _clipped(frame: Frame, y: float) -> float:
    """A setting beyond the range is drawn at its edge."""
    return min(max(y, frame.y[0]), frame.y[1])


def _end(kind: str, x: float, y: float) -> Markup:
    if kind == "x":
        return tag("path", d=f"M{x - 5:.1f},{y - 5:.1f}l10,10m0,-10l-10,10", class_="end")
    if kind == "|":
        return tag("path", d=f"M{x:.1f},{y - 6:.1f}v12", class_="end")
    return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_="end open" if kind == "o" else "dot")


def _y_axis(frame: Frame) -> list[Markup]:
    marks = []
    values = ticks(*frame.y, 6)
    show = _labels(values)
    for value in values:
        y = f"{frame.at_y(value):.1f}"
        marks.append(tag("line", x1=LEFT, x2=frame.width - RIGHT, y1=y, y2=y, class_="grid"))
        marks.append(tag("text", show(value), x=LEFT - 8, y=y, dy="0.35em", class_="tick end-anchor"))
    return marks


def _labels(values: Sequence[float]) -> Callable[[float], str]:
    """How the marks of an axis are written: all alike, with as many decimals as their distance needs."""
    apart = values[1] - values[0] if len(values) > 1 else 1.0
    largest = max(map(abs, values), default=1.0)
    if 0 < largest < 0.001:
        return lambda value: words.value(value, 2)
    size, unit = words.unit(largest) if largest >= 10_000 else (1.0, "")
    apart /= size
    decimals = next((digits for digits in range(8) if abs(round(apart, digits) - apart) < 1e-6 * apart), 8)
    return lambda value: words.fixed(value / size, decimals) + unit if value else "0"


def _x_axis(frame: Frame, values: Sequence[float], label: str, texts: Sequence[str] | None = None) -> list[Markup]:
    bottom = frame.height - BOTTOM
    marks = [tag("line", x1=LEFT, x2=frame.width - RIGHT, y1=bottom, y2=bottom, class_="axis")]
    for value, text in zip(values, texts or [words.compact(value) for value in values], strict=True):
        x = f"{frame.at_x(value):.1f}"
        marks.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        marks.append(tag("text", text, x=x, y=bottom + 8, dy="0.75em", class_="tick middle"))
    return [*marks, tag("text", label, x=frame.width - RIGHT, y=frame.height - 3, class_="label end-anchor")]


@dataclass(frozen=True)
class Point:
    """A setting in a chart of one swept key. x: its value. values: of its jobs. kind: `best` for the winner, `stopped` for one stopped early."""

    x: object
    mean: float
    spread: float | None
    values: Sequence[float]
    title: str
    kind: str = ""
    job: str | None = None


def curve(points: Sequence[Point], *, label: str, x_label: str, connect: bool = True, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Markup:
    """The metric over one swept key: means with their spread, each job a small dot; a line if the values are numbers and `connect`."""
    scale = Scale.of(point.x for point in points)
    values = np.array([value for point in points for value in (*point.values, point.mean)])
    low, high = limits([Curve(values, values)])
    frame = Frame((-0.04, 1.04), (min(low, float(values.min())), high), *size)
    ordered = sorted(points, key=lambda point: scale(point.x))
    marks = [_point(frame, scale(point.x), point) for point in ordered]
    if connect and scale.kind != "places":
        ended = [point for point in ordered if point.kind != "stopped"]
        means = Curve(np.array([scale(point.x) for point in ended]), np.array([point.mean for point in ended]))
        marks.insert(0, tag("path", d=_path(frame, inside(means, *frame.y)), class_="join"))
    at, texts = scale.marks(0.16 if size[0] < WIDTH else 0.09)
    grid = [*_y_axis(frame), *_x_axis(frame, at, x_label, texts)]
    return frame.svg(*grid, marks, label=label)


def _point(frame: Frame, place: float, point: Point) -> Markup:
    x, y = frame.at_x(place), frame.at_y(_clipped(frame, point.mean))
    parts = [tag("title", point.title)]
    if point.spread:
        low, high = (frame.at_y(_clipped(frame, point.mean + sign * point.spread)) for sign in (-1, 1))
        parts.append(tag("path", d=f"M{x:.1f},{low:.1f}V{high:.1f}m-5,0h10M{x - 5:.1f},{low:.1f}h10", class_="spread"))
    if len(point.values) > 1:
        parts += [
            tag("circle", cx=f"{x + 10:.1f}", cy=f"{frame.at_y(_clipped(frame, value)):.1f}", r=2.4, class_="seed")
            for value in point.values
        ]
    parts.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=6 if point.kind == "best" else 4.4, class_="mean"))
    return tag("g", parts, class_=f"point {point.kind}".strip(), data_job=point.job)


@dataclass(frozen=True)
class Track:
    """A setting in parallel coordinates. places: 0 (low) to 1 on each axis; None if it has no value. goodness: 0 (worst) to 1 (best).
    kind: as for a Point."""

    places: Sequence[float | None]
    goodness: float
    title: str
    kind: str = ""
    job: str | None = None


@dataclass(frozen=True)
class Axis:
    """An axis of parallel coordinates. marks: place -> text."""

    name: str
    marks: dict[float, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, scale: Scale) -> Axis:
        """The axis of a swept key: every value if there are few, else the lowest, the middle and the highest; none overlaps another."""
        values = list(scale.values)
        if len(values) > 6 and scale.kind != "places":
            values = [values[0], values[len(values) // 2], values[-1]]
        texts = words.apart(scale.values, 2)
        marks: dict[float, str] = {}
        for place, value in ((scale(value), value) for value in values):
            if not marks or place - max(marks) >= _LINE:
                marks[place] = words.cut(texts[value], 14)
        return cls(name, marks)


def parallel(axes: Sequence[Axis], tracks: Sequence[Track], *, label: str) -> Markup:
    """Parallel coordinates: a vertical axis per key, the metric last; a line per setting, stronger the better it is, the best on top."""
    width, height, side, top, bottom = 1140, 340, 80, 44, 26
    x = [round(side + (width - 2 * side) * number / max(1, len(axes) - 1)) for number in range(len(axes))]

    def y(place: float) -> float:
        return height - bottom - place * (height - top - bottom)

    marks: list[Markup] = []
    for track in sorted(tracks, key=lambda track: (track.kind == "best", track.goodness)):
        points = [(x[axis], y(place)) for axis, place in enumerate(track.places) if place is not None]
        if len(points) > 1:
            path = tag("path", d="M" + "L".join(f"{px},{py:.1f}" for px, py in points), class_="line")
            marks.append(
                tag(
                    "g",
                    tag("title", track.title),
                    path,
                    class_=f"track {track.kind}".strip(),
                    style=f"--p:{round(100 * track.goodness)}%",
                    data_job=track.job,
                )
            )
    for axis, px in zip(axes, x, strict=True):
        marks.append(tag("line", x1=px, x2=px, y1=y(0), y2=y(1), class_="upright"))
        marks.append(tag("text", axis.name, x=px, y=18, class_="name middle"))
        marks += [tag("text", text, x=px + 7, y=f"{y(place):.1f}", dy="0.35em", class_="tick halo") for place, text in axis.marks.items()]
    frame = Frame((0, 1), (0, 1), width, height)
    return frame.svg(marks, label=label, kind="parallel")


def strip(values: Sequence[float], mean: float, spread: float | None, span: tuple[float, float]) -> Markup:
    """A setting's place among the others, for a cell of the ranking: its mean, a bar for the spread, a dot per job. span: the range of all."""
    frame = padded(*span)

    def x(value: float) -> float:
        return 4 + min(max((value - frame[0]) / (frame[1] - frame[0]), 0), 1) * 112

    parts = [tag("line", x1=4, x2=116, y1=10, y2=10, class_="grid")]
    if spread:
        parts.append(
            tag(
                "rect",
                x=f"{x(mean - spread):.1f}",
                y=6,
                width=f"{max(1, x(mean + spread) - x(mean - spread)):.1f}",
                height=8,
                rx=2,
                class_="band",
            )
        )
    parts += [tag("circle", cx=f"{x(value):.1f}", cy=10, r=2.6, class_="seed") for value in values]
    parts.append(tag("line", x1=f"{x(mean):.1f}", x2=f"{x(mean):.1f}", y1=3, y2=17, class_="mean"))
    return tag("svg", parts, viewBox="0 0 120 20", class_="strip", aria_hidden="true")
