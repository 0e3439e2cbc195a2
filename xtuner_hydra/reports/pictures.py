"""Pictures for places that cannot show HTML: loss.png of a run, sweep.png of a sweep. matplotlib without pyplot, so that no global state remains."""

from __future__ import annotations

import logging
import os
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xtuner_hydra import words
from xtuner_hydra.files import umask
from xtuner_hydra.reports import drawing
from xtuner_hydra.reports.curves import SMOOTH_FROM, Curve, Scale, curve, limits, smooth, smoothed, thinned
from xtuner_hydra.reports.drawing import BEST, ENDS, MetricScale
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.results.run import Run, load_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b62a8", "#d55e00", "#008f68", "#a0458f", "#b98700", "#3a9fdc")
GREY, GRID, TEXT = "#8a939b", "#e5e7eb", "#16191d"
DPI = 130
FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
             "Hiragino Sans GB", "Microsoft YaHei")  # fmt: skip
"""Fonts for letters in names of runs and values that matplotlib's own font lacks."""


def loss_png(run_dir: Path) -> Path | None:
    """Draw loss, evaluations and learning rate over tokens to loss.png; None if there is no finite loss to draw."""
    run = load_run(run_dir)
    train = curve(run, "train/loss")
    if not len(train):
        return None
    figure = _figure(9, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_loss(upper, train, curve(run, "eval/loss"))
    rate = curve(run, "train/lr")
    lower.plot(rate.x, rate.y, color=GREY, linewidth=1.5)
    lower.set(ylabel="learning rate", xlabel="tokens", ylim=(0, None))
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (upper, lower):
        _plain(axes)
    figure.suptitle(_title(run), fontsize=11)
    return _save(figure, run_dir / "loss.png")


def sweep_png(findings: Findings) -> Path:
    """Draw a sweep's answer, its main chart and its loss curves to sweep.png."""
    lines = textwrap.wrap(findings.answer, 118, max_lines=2, placeholder=" …")
    unfair = f" Not a fair comparison: {findings.unfair}." if findings.unfair else ""
    remarks = textwrap.wrap(f"{findings.standing}. {findings.verdict_text}{unfair}", 150)
    head = 0.12 + 0.27 * len(lines) + 0.1 + 0.2 * len(remarks)  # inches
    height = 5 + head
    figure = _figure(13, height)
    top = 1 - head / height
    figure.get_layout_engine().set(rect=(0, 0, 1, top))  # type: ignore[union-attr, call-arg]
    main, losses = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_main(main, findings)
    _draw_losses(losses, findings)
    figure.text(0.01, 1 - 0.1 / height, "\n".join(lines), fontsize=13.5, fontweight="bold", color=TEXT, va="top")
    figure.text(0.01, top + 0.01, "\n".join(remarks), fontsize=10.5, color="#5d656d", va="bottom")
    return _save(figure, findings.result.directory / "sweep.png")


# --- a run


def _draw_loss(axes: Axes, train: Curve, evaluations: Curve) -> None:
    long = len(train) >= SMOOTH_FROM
    raw = thinned(train, 2000)
    axes.plot(raw.x, raw.y, color=COLOURS[0], alpha=0.3 if long else 1, linewidth=1 if long else 1.8, label=None if long else "train",
              marker="." if len(train) < 3 else "")  # fmt: skip
    if long:
        axes.plot(train.x, smooth(train.y), color=COLOURS[0], linewidth=2, label="train (smoothed)")
    if len(evaluations):
        x, y = evaluations.x, evaluations.y
        axes.plot(x, y, "o-", color=COLOURS[1], markersize=6, linewidth=1.2, label="evaluation")
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(words.fixed(y[-1], 3), (x[-1], y[-1]), xytext=(0, -16), textcoords="offset points", ha="right", color=COLOURS[1],
                      fontweight="bold", bbox=box)  # fmt: skip
    low, high = limits([train, evaluations])  # a few losses that exploded must not flatten the others
    axes.set_ylim(low - 0.05 * (high - low), high)  # room for the number below the last evaluation
    axes.set_ylabel("cross-entropy per token")
    axes.legend(frameon=False)


def _title(run: Run) -> str:
    scores = [
        f"{title} {words.fixed(run.final[name], 3)}"
        for title, name in (("train", "train/loss"), ("eval", "eval/loss"))
        if name in run.final
    ]
    return f"{run.name}\n{words.counted(run.step, 'step')}: {', '.join(scores)}"


# --- a sweep


def _draw_main(axes: Axes, findings: Findings) -> None:
    if not findings.ranked or not findings.keys:
        axes.axis("off")
        axes.text(0.5, 0.5, findings.standing, ha="center", va="center", color=GREY, transform=axes.transAxes)
    elif drawing.grid(findings):
        _draw_heat_map(axes, findings)
    elif len(findings.keys) == 1:
        _draw_curve(axes, findings)
    else:
        _draw_parallel(axes, findings)


def _draw_heat_map(axes: Axes, findings: Findings) -> None:
    rows, columns = drawing.grid(findings) or ([], [])
    first, second = findings.keys
    metric = MetricScale.of(findings)
    values = np.full((len(rows), len(columns)), np.nan)
    for setting in findings.ranked:
        values[rows.index(findings.at(setting, first)), columns.index(findings.at(setting, second))] = metric.goodness(setting)
    axes.imshow(values, cmap="Blues", vmin=-0.15, vmax=1.25, aspect="auto")
    for setting in findings.settings:
        row, column = rows.index(findings.at(setting, first)), columns.index(findings.at(setting, second))
        if setting.mean is None:
            axes.text(column, row, textwrap.fill(findings.setting_state(setting), 14), ha="center", va="center", color=GREY, fontsize=10)
            continue
        best = findings.rank(setting) == 1
        colour = "white" if metric.goodness(setting) > 0.8 else TEXT
        spread = f"\n± {findings.difference(setting.spread)}" if setting.spread is not None else ""
        axes.text(column, row, findings.number(setting.mean) + spread, ha="center", va="center", color=colour, fontsize=12,
                  fontweight="bold" if best else None, linespacing=1.5)  # fmt: skip
        if best:
            axes.add_patch(_rectangle(column, row))
    axes.set_xticks(range(len(columns)), [findings.text(second, column) for column in columns])
    axes.set_yticks(range(len(rows)), [findings.text(first, row) for row in rows])
    axes.set(xlabel=second, ylabel=first, title=findings.metric)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _rectangle(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor=TEXT, linewidth=2.5)


def _draw_curve(axes: Axes, findings: Findings) -> None:
    key = findings.keys[0]
    scale = Scale.of(findings.at(setting, key) for setting in findings.shown)
    settings = sorted(findings.ranked, key=lambda setting: scale(findings.at(setting, key)))
    x = [scale(findings.at(setting, key)) for setting in settings]
    means = [setting.mean or 0.0 for setting in settings]
    spreads = [setting.spread or 0.0 for setting in settings]
    style = "o-" if scale.kind != "places" else "o"
    axes.errorbar(x, means, yerr=spreads, fmt=style, color=COLOURS[0], markerfacecolor="white", markersize=7, linewidth=1.4, capsize=4)
    stopped = [(scale(findings.at(setting, key)), setting.stopped or 0.0) for setting in findings.stopped]
    if stopped:
        axes.plot(*zip(*stopped, strict=True), "o", color=GREY, markerfacecolor="none", markersize=7, label="stopped early, last value")
        axes.legend(frameon=False)
    best = settings.index(findings.ranked[0])
    axes.plot(x[best], means[best], "o", color=COLOURS[0], markersize=10, zorder=5)
    axes.annotate(
        findings.number(means[best]), (x[best], means[best]), xytext=(0, -18), textcoords="offset points", ha="center", fontweight="bold"
    )
    ends = np.array([mean + sign * spread for mean, spread in zip(means, spreads, strict=True) for sign in (-1, 1)])
    early = np.array([value for _, value in stopped])
    low, high = limits([Curve(ends, ends), Curve(early, early)])
    axes.set_ylim(low - 0.1 * (high - low), high)  # room for the best one's number
    axes.set_xticks(*scale.marks(0.09))
    axes.set(xlabel=key, title=findings.metric)
    _plain(axes)


def _draw_parallel(axes: Axes, findings: Findings) -> None:
    keys, metric = findings.telling_keys[:6], MetricScale.of(findings)
    scales = {key: Scale.of(findings.at(setting, key) for setting in findings.shown) for key in keys}
    for setting in reversed(findings.shown):
        y = [*(scales[key](findings.at(setting, key)) for key in keys), metric.place(setting)]
        good, best = metric.goodness(setting), findings.rank(setting) == 1
        axes.plot(
            range(len(y)),
            y,
            color=COLOURS[BEST if best else 0],
            alpha=1 if best else 0.1 + 0.6 * good,
            linewidth=3 if best else 1.2,
            linestyle="--" if setting.stopped is not None else "-",
        )
    for place, key in enumerate(keys):
        axes.axvline(place, color=GREY, linewidth=0.8)
        for end, value in ((-0.04, scales[key].values[0]), (1.04, scales[key].values[-1])):
            axes.text(
                place,
                end,
                words.cut(findings.text(key, value, 2), 24),
                ha="center",
                va="top" if end < 0 else "bottom",
                fontsize=9,
                color="#5d656d",
            )
    axes.axvline(len(keys), color=GREY, linewidth=0.8)
    for end, value in ((-0.04, metric.low), (1.04, metric.high)):
        axes.text(len(keys), end, findings.number(value), ha="center", va="top" if end < 0 else "bottom", fontsize=9, color="#5d656d")
    axes.set_xticks(range(len(keys) + 1), [*(findings.short[key] for key in keys), findings.metric], rotation=12)
    axes.set(yticks=[], ylim=(-0.14, 1.14))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_losses(axes: Axes, findings: Findings) -> None:
    """Training loss of all jobs, the best setting's on top."""
    colours, entries = drawing.colours(findings, len(COLOURS))
    shown = []
    for setting in reversed(findings.settings):
        for job in setting.jobs:
            line = thinned(smoothed(curve(job.run, "train/loss"), 0.05), 400) if job.run else Curve(np.empty(0), np.empty(0))
            if not len(line):
                continue
            place, best = colours[job.number], findings.rank(setting) == 1
            ended = ENDS.get(job.state, "")
            colour = GREY if place is None else COLOURS[place]
            axes.plot(line.x, line.y, color=colour, linewidth=2.4 if best else 1.1, alpha=1 if best else 0.75, linestyle=":" if ended == "x" else "-",
                      marker=ended or None, markevery=[-1], markersize=8)  # fmt: skip
            if ended != "x":
                shown.append(line)
    for place, name in entries:
        axes.plot([], [], color=GREY if place is None else COLOURS[place], linewidth=2.4, label=name)
    if shown:
        axes.set_ylim(*limits(shown))
        axes.set_xlim(0, None)
    axes.xaxis.set_major_formatter(lambda value, _: words.compact(value))
    axes.set(xlabel="tokens", title="training loss, the best setting thick" if findings.best else "training loss")
    if entries:
        axes.legend(frameon=False)
    _plain(axes)


# --- both


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure as Drawing  # takes half a second, so it is imported only for a picture

    return Drawing(figsize=(width, height), dpi=DPI, layout="constrained")


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _families() -> list[str]:
    """matplotlib's own font, then any installed ones with more letters."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FALLBACKS if name in installed)]


@contextmanager
def _fonts_unmentioned() -> Iterator[None]:
    """Hide warnings: a letter that no font has is drawn as a box, and a font without a bold face as it is."""
    finder = logging.getLogger("matplotlib.font_manager")
    level = finder.level
    finder.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            yield
    finally:
        finder.setLevel(level)


def _save(figure: Figure, path: Path) -> Path:
    """Write the picture, completely or not at all."""
    from matplotlib.text import Text

    families = _families()
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a `$` in a name or a value does not start a formula
        text.set_fontfamily(families)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~umask())
            with _fonts_unmentioned():
                figure.savefig(file, format="png")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
