"""Curves keep their shape and their ends when they are thinned out, and axes have round marks."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from runs import evaluation, make_run, step

from xtuner_hydra.reports.curves import Curve, Scale, curve, inside, limits, smooth, thinned, ticks
from xtuner_hydra.results.run import load_run


def test_a_curve_is_what_metrics_jsonl_says_without_what_is_not_finite(tmp_path):
    run = load_run(make_run(tmp_path / "run", [step(1, 3.0), step(2, None), step(3, 2.5), evaluation(3, 2.0)]))
    assert curve(run, "train/loss").x.tolist() == [100.0, 300.0]
    assert curve(run, "train/loss").y.tolist() == [3.0, 2.5]
    assert curve(run, "eval/loss").y.tolist() == [2.0]
    assert len(curve(run, "no/metric")) == 0


def test_thinning_keeps_the_ends_and_every_spike():
    y = np.sin(np.arange(10_000) / 500)
    y[4321] = 50.0
    few = thinned(Curve(np.arange(10_000.0), y), 160)
    assert len(few) <= 170
    assert few.x[[0, -1]].tolist() == [0.0, 9999.0]
    assert (few.y.max(), few.y.min()) == (50.0, y.min())
    assert (np.diff(few.x) > 0).all()


def test_smoothing_is_the_mean_of_a_window():
    values = np.random.default_rng(0).standard_normal(500)
    expected = [values[max(0, i - 5) : i + 6].mean() for i in range(500)]
    np.testing.assert_allclose(smooth(values), expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 8))
def test_ticks_are_few_round_and_inside(low, span, most):
    assume(span > 1e-8 * abs(low))  # or neighbouring floats decide
    high = low + span
    marks = ticks(low, high, most)
    assert 1 <= len(marks) <= most
    assert all(low - 1e-6 * span <= mark <= high + 1e-6 * span for mark in marks)
    if len(marks) > 2:
        assert np.allclose(np.diff(marks), marks[1] - marks[0])


def test_a_loss_that_exploded_does_not_flatten_the_others():
    low, high = limits([Curve(np.arange(100.0), np.linspace(3, 2, 100)), Curve(np.arange(2.0), np.array([3.0, 1e9]))])
    assert 1.9 < low < 2
    assert 3 < high < 3.3


def test_what_leaves_the_picture_ends_at_its_edge():
    line = Curve(np.arange(7.0), np.array([1.0, 3.0, 9.0, 9.0, 1.0, 2.0, 4.0]))
    first, second = inside(line, 0.0, 3.0)
    assert (first.x.tolist(), first.y.tolist()) == ([0.0, 1.0], [1.0, 3.0])
    assert (second.x.tolist(), second.y.tolist()) == ([3.75, 4.0, 5.0, 5.5], [3.0, 1.0, 2.0, 3.0])
    (through,) = inside(Curve(np.array([0.0, 1.0]), np.array([0.0, 10.0])), 2.0, 4.0)
    assert (through.x.tolist(), through.y.tolist()) == (pytest.approx([0.2, 0.4]), [2.0, 4.0])
    assert inside(Curve(np.array([1.0]), np.array([5.0])), 0.0, 3.0) == inside(line, 20.0, 30.0) == []
    assert [len(part) for part in inside(line, 0.0, 10.0)] == [7]


@pytest.mark.parametrize(
    ("values", "kind", "places"),
    [
        ([1e-5, 1e-4, 1e-3], "log", [0, 0.5, 1]),
        ([1, 2, 3], "linear", [0, 0.5, 1]),
        ([0.0, 1.0, 100.0], "linear", [0, 0.01, 1]),
        (["a", "c", "b"], "places", [0, 1, 0.5]),
        ([True, False], "places", [1, 0]),
        ([None, 5], "places", [1, 0]),
        ([7], "linear", [0.5]),
    ],
)
def test_scales(values, kind, places):
    scale = Scale.of(values)
    assert scale.kind == kind
    assert [scale(value) for value in values] == pytest.approx(places)


@given(st.lists(st.floats(1e-7, 1e-2), min_size=1, max_size=40, unique=True))
def test_marks_of_an_axis_do_not_run_into_each_other(values):
    scale = Scale.of(values)
    at, texts = scale.marks(0.09)
    assert at[0] == scale(min(values))
    assert len(texts) == len(at)
    letter = 0.012  # of the picture's axis
    ends = [(place - letter * len(text) / 2, place + letter * len(text) / 2) for place, text in zip(at, texts, strict=True)]
    assert all(left[1] < right[0] for left, right in pairwise(ends))
