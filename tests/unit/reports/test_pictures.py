"""loss.png and sweep.png are pictures of something, whatever the runs were like."""

import matplotlib.figure
import matplotlib.image
import numpy
import pytest
from runs import evaluation, finished, make_run, make_sweep
from runs import step as row

from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.reports.pictures import loss_png, sweep_png
from xtuner_hydra.results.sweep import read_sweep


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
    make_run(tmp_path, rows)
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
    make_run(tmp_path, rows)
    image = matplotlib.image.imread(loss_png(tmp_path))
    upper = image[: image.shape[0] * 3 // 4]
    blue = (upper[..., 2] > 0.6) & (upper[..., 0] < 0.4)
    y, x = blue.nonzero()
    curve = x < image.shape[1] * 0.8  # the legend stands in the upper right corner
    assert numpy.corrcoef(x[curve], y[curve])[0, 1] > 0.99


def test_a_spike_does_not_flatten_the_loss(tmp_path, monkeypatch):
    """The loss falls from 9 to 5; one step of it was 1e30."""
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    loss_png(make_run(tmp_path / "run", [row(number, 1e30 if number == 30 else 9 - number / 25) for number in range(1, 101)]))
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 5
    assert 9 <= high < 12


@pytest.mark.parametrize("rows", [[], [row(1, None)], [evaluation(0, 3.0)]])
def test_without_a_loss_there_is_no_picture(tmp_path, rows):
    make_run(tmp_path, rows)
    assert loss_png(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


def test_a_picture_leaves_nothing_behind(tmp_path):
    """Neither a temporary file, nor a figure that a later plot would land on."""
    from matplotlib import pyplot

    make_run(tmp_path, [row(1, 3.0), row(2, 2.0)])
    before = {path.name for path in tmp_path.iterdir()}
    assert loss_png(tmp_path).stat().st_mode & 0o777 == (tmp_path / "status.json").stat().st_mode & 0o777
    assert {path.name for path in tmp_path.iterdir()} == before | {"loss.png"}
    assert pyplot.get_fignums() == []


SWEEPS = {
    "two keys": [({"optimizer.lr": lr, "data.pack_max_length": n}, finished(lr * 1e4 + n / 100)) for lr in (1e-4, 2e-4) for n in (64, 128)],
    "one key, seeds": [
        ({"optimizer.lr": lr, "trainer.seed": seed}, finished(lr * 1e4 + seed / 9)) for lr in (1e-4, 1e-3) for seed in (0, 1)
    ],
    "three keys": [
        ({"optimizer.lr": 1e-4 * n, "optimizer.weight_decay": n % 2, "scheduler.warmup_ratio": n / 9}, finished(float(n)))
        for n in range(1, 8)
    ],
    "a word": [({"scheduler.name": name}, finished(2.0)) for name in ("cosine", "constant")],
    "stopped early": [
        ({"optimizer.lr": 1e-4 * n}, finished(2.0) if n < 3 else {"rows": [row(1, 3.0), evaluation(1, 2.5)], "pruned": "hopeless"})
        for n in range(1, 5)
    ],
    "a grid with holes": [
        (
            {"optimizer.lr": lr, "data.pack_max_length": n},
            finished(lr * 1e4) if n > 64 else {"rows": [row(1, None)], "state": "failed", "error": "x"},
        )
        for lr in (1e-4, 2e-4)
        for n in (64, 128, 256)
    ],
    "one job": [({"optimizer.lr": 1e-4}, finished(2.0))],
    "nothing yet": [({"optimizer.lr": lr}, None) for lr in (1e-4, 1e-3)],
    "all failed": [({"optimizer.lr": lr}, {"rows": [row(1, None)], "state": "failed", "error": "x"}) for lr in (1e-4, 1e-3)],
}


@pytest.mark.parametrize("jobs", SWEEPS.values(), ids=SWEEPS)
def test_a_sweep_has_a_picture_at_any_moment(tmp_path, jobs):
    image = matplotlib.image.imread(sweep_png(Findings(read_sweep(make_sweep(tmp_path, jobs)))))
    assert 0.002 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.7


def test_the_heat_map_is_darkest_where_the_loss_is_lowest(tmp_path):
    jobs = [({"optimizer.lr": lr, "data.pack_max_length": n}, finished(lr * 1e4 + n / 100)) for lr in (1e-4, 2e-4) for n in (64, 128)]
    image = matplotlib.image.imread(sweep_png(Findings(read_sweep(make_sweep(tmp_path, jobs)))))[..., :3]
    height, width, _ = image.shape
    left = image[height // 4 : height * 4 // 5, width // 15 : width * 4 // 10].sum(axis=2)
    middle, centre = left.shape[0] // 2, left.shape[1] // 2
    quarters = [
        float(numpy.median(part))
        for part in (left[:middle, :centre], left[:middle, centre:], left[middle:, :centre], left[middle:, centre:])
    ]
    assert quarters[0] == min(quarters)
    assert quarters[3] == max(quarters)


@pytest.mark.parametrize(("steps", "is_fair"), [((3, 3), True), ((3, 30), False)])
def test_a_sweeps_picture_says_that_a_comparison_is_not_fair(tmp_path, monkeypatch, steps, is_fair):
    written = []
    write = matplotlib.figure.Figure.text
    monkeypatch.setattr(matplotlib.figure.Figure, "text", lambda self, x, y, s, **more: written.append(s) or write(self, x, y, s, **more))
    jobs = [({"optimizer.lr": lr}, finished(2.0 + lr, steps=number)) for lr, number in zip((1e-4, 2e-4), steps, strict=True)]
    sweep_png(Findings(read_sweep(make_sweep(tmp_path, jobs))))
    assert ("Not a fair comparison: The settings were trained on different" not in " ".join(written)) == is_fair
