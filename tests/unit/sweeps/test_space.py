"""What a command line sweeps, and which jobs that makes."""

import itertools

import pytest

from xtuner_hydra.app import App
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.sweeps import space


def split(*overrides):
    with App(["-m", *overrides]) as app:
        return space.split(app, app.sweep_config())


def test_values_with_commas_are_swept_and_the_rest_is_shared():
    fixed, parameters = split("debug=fast", "optimizer.lr=1e-5,6e-5", "trainer.seed=3", "hydra.sweep.dir=x", "sweep.retries=2")
    assert fixed == ["debug=fast", "trainer.seed=3"]
    assert [(one.key, one.values) for one in parameters] == [("optimizer.lr", ("1e-05", "6e-05"))]


@pytest.mark.parametrize(
    ("text", "values"),
    [("range(1,4)", ("1", "2", "3")), ("choice(3,1)", ("3", "1")), ("[0.9,0.9],[0.8,0.9]", ("[0.9,0.9]", "[0.8,0.9]"))],
)
def test_hydras_ways_to_say_several_values(text, values):
    key = "optimizer.betas" if text.startswith("[") else "trainer.seed"
    _, (parameter,) = split(f"{key}={text}")
    assert parameter.values == values


def test_a_preset_is_swept_and_the_command_line_wins_over_it():
    fixed, parameters = split("sweep=lr_x_packing", "optimizer.lr=1e-3,1e-4")
    assert {one.key: one.values for one in parameters} == {
        "optimizer.lr": ("0.001", "0.0001"),
        "data.pack_max_length": ("1024", "2048", "4096"),
    }
    assert fixed == ["trainer.total_tokens=50000"]
    fixed, parameters = split("sweep=lr_x_packing", "optimizer.lr=1e-3", "trainer.total_tokens=9")
    assert [one.key for one in parameters] == ["data.pack_max_length"]
    assert fixed == ["optimizer.lr=1e-3", "trainer.total_tokens=9"]


def test_a_presets_duration_gives_way_to_one_that_was_chosen():
    for overrides in (["debug=fast"], ["trainer.total_steps=7"], ["trainer.epochs=2"]):
        fixed, _ = split("sweep=lr_x_packing", *overrides)
        assert fixed == overrides


def test_a_grid_is_every_combination_with_the_last_parameter_fastest():
    _, parameters = split("optimizer.lr=1,2,3", "trainer.seed=4,5")
    wanted = [[f"optimizer.lr={lr}", f"trainer.seed={seed}"] for lr, seed in itertools.product((1, 2, 3), (4, 5))]
    assert space.jobs(parameters, "grid") == wanted


def test_zip_takes_first_values_together_and_refuses_unequal_numbers():
    _, parameters = split("sweep.search=zip", "optimizer.lr=1,1,2", "trainer.seed=4,5,6")
    assert space.jobs(parameters, "zip") == [[f"optimizer.lr={lr}", f"trainer.seed={seed}"] for lr, seed in ((1, 4), (1, 5), (2, 6))]
    _, parameters = split("sweep.search=zip", "optimizer.lr=1,2", "trainer.seed=4,5,6")
    with pytest.raises(RefusedError, match=r"optimizer\.lr 2, trainer\.seed 3"):
        space.jobs(parameters, "zip")


def test_corners_try_every_value_and_both_ends():
    _, parameters = split(
        "sweep.search=random", "optimizer.lr=tag(log,interval(1e-6,1e-3))", "trainer.seed=1,2,3", "data.max_length=interval(8,16)"
    )
    tried = space.corners(parameters)
    for parameter, ends in zip(parameters, (("1e-06", "0.001"), ("1", "2", "3"), ("8", "16")), strict=True):
        assert {text for job in tried for text in job if text.startswith(parameter.key)} == {f"{parameter.key}={end}" for end in ends}


@pytest.mark.parametrize("interval", ["interval(1024,4096)", "int(interval(1024,4096))", "tag(log,interval(1024,4096))"])
def test_an_interval_of_a_whole_number_key_draws_whole_numbers(interval):
    _, parameters = split("sweep.search=random", f"data.pack_max_length={interval}", "optimizer.lr=interval(1,2)")
    assert space.corners(parameters) == [
        ["data.pack_max_length=1024", "optimizer.lr=1.0"],
        ["data.pack_max_length=4096", "optimizer.lr=2.0"],
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.lr=interval(1e-6,1e-3)"], "sweep.search=random"),
        (["sweep.search=bayes", "optimizer.lr=interval(1e-3,1e-6)"], "from a lower to a higher"),
        (["sweep.search=bayes", "optimizer.lr=tag(log,interval(0,1))"], "above 0 for log"),
        (["sweep.keep=best,all"], "only the config of a job"),
        (["trainer.seed=range(1,1)"], "holds no value"),
        (["optimizer.lr=1,2", "optimizer.lr=3"], "given twice"),
        (["optimizer.lrr=1,2"], r"optimizer\.lr"),
    ],
)
def test_what_cannot_be_swept_is_refused(overrides, words):
    with pytest.raises(RefusedError, match=words):
        split(*overrides)
