"""loss.png is a picture of something, whatever the run was like."""

import json

import matplotlib.image
import numpy
import pytest

from xtuner_hydra.reports.pictures import loss_png


def row(step, loss):
    return {"train/step": step, "train/total_tokens": step * 100, "train/loss": loss, "train/lr": 1e-4 / step}


def evaluation(step, loss):
    return {"train/step": step, "train/total_tokens": step * 100, "eval/loss": loss}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row(1, 3.0)], id="one step"),
        pytest.param([row(1, 3.0), row(2, None), row(3, 2.0), evaluation(3, 2.1)], id="a loss that was not finite"),
        pytest.param([row(1, 3.0), row(2, 2.0), evaluation(1, None), evaluation(2, None)], id="evaluations that were not finite"),
        pytest.param([*(row(step, 3 / step) for step in range(1, 500)), evaluation(250, 0.5), evaluation(499, 0.1)], id="long"),
    ],
)
def test_the_picture_shows_something(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = loss_png(tmp_path)
    assert path == tmp_path / "loss.png"
    image = matplotlib.image.imread(path, format="png")
    height, width, _ = image.shape
    assert 600 < width < 2000
    assert 400 < height < 1500
    assert 0.005 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.5  # lines and letters on white


def test_what_is_drawn_is_the_run(tmp_path):
    """A falling loss is high on the left and low on the right."""
    rows = [row(step, 9.0 - step) for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image = matplotlib.image.imread(loss_png(tmp_path))
    upper = image[: image.shape[0] * 3 // 4]
    blue = (upper[..., 2] > 0.6) & (upper[..., 0] < 0.4)
    y, x = blue.nonzero()
    curve = x < image.shape[1] * 0.8  # the legend stands in the upper right corner
    assert numpy.corrcoef(x[curve], y[curve])[0, 1] > 0.99


@pytest.mark.parametrize("rows", [[], [row(1, None)], [evaluation(0, 3.0)]])
def test_without_a_loss_there_is_no_picture(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert loss_png(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


def test_without_metrics_there_is_no_picture(tmp_path):
    assert loss_png(tmp_path) is None
