import json

import matplotlib.image
import pytest

from xtuner_hydra.tracking.plots import loss_png


def row(step, loss):
    return {"train/step": step, "train/total_tokens": step * 100, "train/loss": loss, "train/lr": 1e-4 / step}


def evaluation(step, loss):
    return {"train/step": step, "train/total_tokens": step * 100, "eval/loss": loss}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row(1, 3.0)], id="one step"),
        pytest.param([row(1, 3.0), row(2, None), row(3, 2.0), evaluation(3, 2.1)], id="a loss that was not finite"),
        pytest.param([*(row(step, 3 / step) for step in range(1, 500)), evaluation(250, 0.5), evaluation(499, 0.1)], id="long"),
    ],
)
def test_the_picture_shows_something(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image = matplotlib.image.imread(loss_png(tmp_path))
    height, width, _ = image.shape
    assert 600 < width < 2000
    assert 400 < height < 1500
    assert 0.005 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.5  # lines and letters on white


@pytest.mark.parametrize("rows", [[], [row(1, None)], [evaluation(0, 3.0)]])
def test_without_a_loss_there_is_no_picture(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert loss_png(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()
