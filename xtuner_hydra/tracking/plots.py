"""loss.png: how a run went, at a glance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from xtuner_hydra.tracking import jsonl
from xtuner_hydra.tracking.base import Row

_TRAIN, _EVAL, _LR = "#2a6fbb", "#d1495b", "#6b7280"
_SMOOTH_FROM = 60  # rows; fewer are read better as they are


def loss_png(run_dir: Path) -> Path | None:
    """Draw loss, evaluations and learning rate over tokens from metrics.jsonl; None where there is no finite loss to draw."""
    rows = jsonl.read(run_dir / "metrics.jsonl")
    train = [row for row in rows if _finite(row, "train/loss")]
    evaluations = [row for row in rows if _finite(row, "eval/loss")]
    if not train:
        return None
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9, 5.5), dpi=130, sharex=True, height_ratios=(4, 1), layout="constrained", subplot_kw={"axisbelow": True}
    )
    _draw_loss(upper, train, evaluations)
    lower.plot(_column(train, "train/total_tokens"), _column(train, "train/lr"), color=_LR, linewidth=1.5)
    lower.set(ylabel="learning rate", xlabel="tokens", ylim=(0, None))
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (upper, lower):
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(run_dir, rows), fontsize=11)
    path = run_dir / "loss.png"
    figure.savefig(path)
    plt.close(figure)
    return path


def _draw_loss(axes: Any, train: list[Row], evaluations: list[Row]) -> None:
    tokens, loss = _column(train, "train/total_tokens"), _column(train, "train/loss")
    long = len(train) >= _SMOOTH_FROM
    axes.plot(
        tokens,
        loss,
        color=_TRAIN,
        alpha=0.3 if long else 1,
        linewidth=1 if long else 1.8,
        label=None if long else "train",
        marker="." * (len(train) < 3),
    )
    if long:
        axes.plot(tokens, _smooth(loss), color=_TRAIN, linewidth=2, label="train (smoothed)")
    if evaluations:
        at, value = _column(evaluations, "train/total_tokens"), _column(evaluations, "eval/loss")
        axes.plot(at, value, "o-", color=_EVAL, markersize=6, linewidth=1.2, label="evaluation")
        axes.annotate(
            f"{value[-1]:.3f}",
            (at[-1], value[-1]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="right",
            color=_EVAL,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set_ylabel("cross-entropy a token")
    axes.legend(frameon=False)


def _title(run_dir: Path, rows: list[Row]) -> str:
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    scores = [f"{title} {last[name]:.3f}" for title, name in (("train", "train/loss"), ("eval", "eval/loss")) if name in last]
    return f"{run_dir.name}\n{last['train/step']} steps: {', '.join(scores)}"


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of 2 % of the rows, centred, narrower at the ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _column(rows: list[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def _finite(row: Row, name: str) -> bool:
    value = row.get(name)
    return value is not None and math.isfinite(value)
