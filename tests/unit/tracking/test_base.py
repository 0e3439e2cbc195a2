"""One tracker that fails must not end a run, unless the run is of no use without it."""

import logging

import pytest

from xtuner_hydra.config.schema import TrackingConfig, WandbConfig
from xtuner_hydra.errors import TrainingError
from xtuner_hydra.tracking import build_trackers
from xtuner_hydra.tracking.base import Trackers


class Stand:
    """A tracker that keeps its rows, and fails where it is told to."""

    def __init__(self, *, required=False, fails=None):
        self.required, self.fails, self.rows, self.end = required, fails, [], None

    def log(self, row):
        if self.fails == "log":
            raise TrainingError("the disk is full")
        self.rows.append(row)

    def finish(self, state, exit_code):
        self.end = (state, exit_code)
        if self.fails == "finish":
            raise OSError("no answer")


def test_one_that_fails_is_left_out_with_a_warning_and_the_others_go_on(caplog):
    good, bad = Stand(), Stand(fails="log")
    trackers = Trackers([bad, good])
    with caplog.at_level("WARNING", "xtuner_hydra"):
        for step in (1, 2):
            trackers.log({"train/step": step})
    assert len(good.rows) == 2
    assert caplog.text.count("left out from now on") == 1


def test_one_that_is_required_stops_the_run():
    with pytest.raises(TrainingError, match="the disk is full"):
        Trackers([Stand(required=True, fails="log")]).log({"train/step": 1})


def test_all_are_finished_even_if_one_cannot(caplog):
    stands = [Stand(), Stand(fails="finish"), Stand()]
    with caplog.at_level("WARNING", "xtuner_hydra"):
        Trackers(stands).finish("failed", 1)
    assert [stand.end for stand in stands] == [("failed", 1)] * 3
    assert "could not be closed: no answer" in caplog.text


@pytest.mark.parametrize(("variable", "directories"), [("disabled", []), ("offline", ["wandb"])])
def test_wandb_is_left_out_where_its_own_variable_says_so(tmp_path, monkeypatch, variable, directories):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = TrackingConfig(jsonl=False, tensorboard=False, wandb=WandbConfig(enabled=True, mode="auto"))
    build_trackers(config, tmp_path, resolved={"model": {"moe": None}}, overrides=[], total_steps=1, start_step=0).finish("completed", 0)
    assert [path.name for path in tmp_path.iterdir()] == directories


@pytest.mark.parametrize(("experts", "total"), [(None, "2.000"), ({"router_aux_loss_coef": 0.5}, "4.000")])
def test_the_console_knows_how_much_the_auxiliary_loss_counts(tmp_path, caplog, experts, total):
    config = TrackingConfig(jsonl=False, tensorboard=False, wandb=WandbConfig(enabled=False))
    trackers = build_trackers(config, tmp_path, resolved={"model": {"moe": experts}}, overrides=[], total_steps=1, start_step=0)
    names = ("train/lr", "train/tokens", "train/grad_norm", "throughput/data_time", "throughput/step_time", "throughput/tgs")
    zeros = dict.fromkeys((*names, "throughput/e2e_tgs", "memory/max_gb", "memory/reserved_gb"), 0.0)
    logging.getLogger("xtuner_hydra").propagate = True  # a run in this process would have turned it off
    with caplog.at_level("INFO", "xtuner_hydra"):
        trackers.log({**zeros, "train/step": 1, "train/loss": 2.0, "train/aux_loss": 4.0})
    assert f"total_loss: {total} reduced_llm_loss: 2.000" in caplog.text


def test_a_dashboard_that_cannot_be_opened_is_left_out_with_a_warning(tmp_path, caplog):
    for name in ("wandb", "tensorboard"):
        (tmp_path / name).touch()  # where its directory should be
    config = TrackingConfig(jsonl=True, tensorboard=True, wandb=WandbConfig(enabled=True, mode="offline"))
    with caplog.at_level("WARNING", "xtuner_hydra"):
        trackers = build_trackers(config, tmp_path, resolved={"model": {"moe": None}}, overrides=[], total_steps=1, start_step=0)
        trackers.log({"train/step": 1, "train/loss": 1.0})
    trackers.finish("completed", 0)
    assert ("TensorBoard is left out" in caplog.text, "W&B is left out" in caplog.text) == (True, True)
    assert '"train/step": 1' in (tmp_path / "metrics.jsonl").read_text()
