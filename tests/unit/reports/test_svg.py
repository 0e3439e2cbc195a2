"""What charts say can be read: no two marks alike, none on top of another."""

import re

import numpy as np
import pytest

from xtuner_hydra.reports import svg
from xtuner_hydra.reports.curves import Curve, Scale


def ticks(chart):
    """The texts at the upright axis."""
    return re.findall(r'class="tick end-anchor"[^>]*>([^<]*)<', str(chart))


@pytest.mark.parametrize("values", [(12_010, 12_050), (9_990, 10_010), (0, 2_500_000), (1.5, 1.5 + 1e-5), (1e-7, 3e-7), (-3.0, 2.0)])
def test_marks_of_the_upright_axis_differ(values):
    texts = ticks(svg.lines([svg.Line(Curve(np.array([0.0, 1.0]), np.array(values, float)), "a")], label="a", x_label="x"))
    assert len(texts) == len(set(texts)) > 2


def test_what_is_alike_but_for_rounding_is_not_blown_up():
    texts = ticks(svg.lines([svg.Line(Curve(np.arange(8.0), 5.5451 + 1e-10 * np.arange(8)), "a")], label="a", x_label="x"))
    assert len(texts) == len(set(texts)) > 2


def test_marks_of_parallel_axes_do_not_overprint():
    axis = svg.Axis.of("weight_decay", Scale.of([0, 0.001, 0.01, 0.1]))
    assert list(axis.marks.values()) == ["0", "0.01", "0.1"]


def test_every_name_is_told_where_there_is_room():
    names = [f"a_chat_template_of_{name}" for name in ("chatml", "qwen3", "xtuner", "llama")]
    points = [svg.Point(name, number, None, [number], name) for number, name in enumerate(names, 1)]
    texts = re.findall(r'class="tick middle"[^>]*>([^<]*)<', str(svg.curve(points, label="a", x_label="x")))
    assert [text[-2:] for text in texts] == [name[-2:] for name in sorted(names)]
    assert all("…" in text for text in texts)
