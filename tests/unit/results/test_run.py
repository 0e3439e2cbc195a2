"""load_run: a run as a notebook sees it."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pytest
from conftest import REPOSITORY
from run_dirs import make_run

import xtuner_hydra
from xtuner_hydra import run_dir
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.results.glance import glance


def test_a_fresh_process_reads_config_and_metrics_without_torch(tmp_path):
    make_run(tmp_path / "run", lr=2e-4, losses=[3.0, None, 2.5])
    cell = """
import sys, xtuner_hydra
run = xtuner_hydra.load_run("run")
assert run.config.optimizer.lr == 2e-4 and run.values["optimizer.lr"] == 2e-4
assert (run.state, run.step, run.total_steps, run.overrides) == ("completed", 3, 3, ["optimizer.lr=0.0002"])
assert run.train["train/step"].tolist() == [1, 2, 3]
assert run.train["train/loss"].dtype == float and run.train["train/loss"][[0, 2]].tolist() == [3.0, 2.5]
assert str(run.train["train/loss"][1]) == "nan"
assert run.eval["eval/loss"].tolist() == [run.final["eval/loss"]]
assert run.final["train/loss"] == 2.5
assert run.environment["versions"]["torch"] and run.data["train"]["samples"] == 10
assert "torch" not in sys.modules and "hydra" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("state", ["running", "failed", "interrupted", "completed"])
def test_a_run_is_read_in_any_state(tmp_path, state):
    run = xtuner_hydra.load_run(make_run(tmp_path, state=state))
    assert run.state == state
    assert run.final["train/loss"] == 2.0


def test_a_killed_run_is_read_to_its_last_whole_row(tmp_path):
    directory = make_run(tmp_path, state="running")
    status = json.loads((directory / "status.json").read_text())
    status["process"]["pid"] = 2**22 + 1  # above the largest there can be
    (directory / "status.json").write_text(json.dumps(status))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 3, "train/lo')
    run = xtuner_hydra.load_run(directory)
    assert (run.state, run.step) == ("killed", 2)


def test_steps_whose_metrics_were_not_logged_count(tmp_path):
    directory = make_run(tmp_path / "run", losses=[3.0, 2.0])
    run_dir.write_status(directory, "interrupted", exit_code=130, step=74, total_steps=100)
    assert (xtuner_hydra.load_run(directory).step, glance(directory).step) == (74, 74)


def test_a_run_that_was_killed_lasted_to_its_last_metrics(tmp_path):
    directory = make_run(tmp_path, state="running", environment={"time": "2026-01-02T03:04:05+00:00"})
    status = run_dir.read_status(directory)
    status["process"]["pid"] = 2**22 + 1
    began = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    (directory / "status.json").write_text(json.dumps(status | {"time": began + 3}))
    os.utime(directory / "metrics.jsonl", (began + 35, began + 35))
    run = xtuner_hydra.load_run(directory)
    assert (run.state, run.seconds) == ("killed", 35)


def test_a_run_that_has_logged_nothing_has_no_metrics(tmp_path):
    directory = make_run(tmp_path, state="running")
    (directory / "metrics.jsonl").unlink()
    run = xtuner_hydra.load_run(directory)
    assert (run.final, run.train, run.step) == ({}, {}, 2)  # its status tells the steps


@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml", "metrics.jsonl"])
def test_what_cannot_be_read_is_refused_by_file(tmp_path, name):
    directory = make_run(tmp_path / "run")
    (directory / name).write_text("- {nonsense\n")
    with pytest.raises(RefusedError, match=rf"{name} cannot be read"):
        xtuner_hydra.load_run(directory)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="not a run directory"):
        xtuner_hydra.load_run(tmp_path)


def test_a_sweep_is_refused_with_a_hint(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RefusedError, match="it is a sweep, and its runs are the directories in it"):
        xtuner_hydra.load_run(tmp_path)


def test_the_columns_make_a_table(tmp_path):
    run = xtuner_hydra.load_run(make_run(tmp_path, losses=[1.0, 2.0, 3.0]))
    assert {len(column) for column in run.train.values()} == {3}
    assert np.isfinite(run.train["throughput/e2e_tgs"]).all()
