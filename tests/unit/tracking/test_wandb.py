"""The offline file that W&B writes, read back record by record; and when a run goes online."""

import json
import math
import os
import re
import socket
import threading

import pytest
import wandb
import wandb_file
import wandb_server
from conftest import wait_for

from xtuner_hydra.config.schema import WandbConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.tracking.base import Trackers
from xtuner_hydra.tracking.wandb import Summary, WandbTracker, nested_overrides, resolve_mode


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """No key, no netrc, no settings of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


ENVIRONMENT = {
    "git": {"commit": "a" * 40, "dirty": True, "diff": "..."},
    "options": {"model": "qwen3_tiny", "data": "openai_sft", "optimizer": "adamw", "experiment": None, "debug": "fast"},
}
ROWS = (
    {"train/step": 1, "train/loss": 2.5, "throughput/tgs": 90.0, "throughput/mfu": None},
    {"train/step": 2, "train/loss": 2.0, "throughput/tgs": 120.0},
    {"train/step": 2, "eval/loss": 2.25},
    {"train/step": 3, "train/loss": 1.5, "throughput/tgs": 110.0},
    {"train/step": 3, "eval/loss": 2.75},
)


def begin(run_dir, *, start_step=0, overrides=(), **config):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return WandbTracker(WandbConfig(**config), run_dir, {"optimizer": {"lr": 6e-5}}, list(overrides), start_step)


def end(tracker, state="completed", exit_code=0):
    tracker.finish(state, exit_code)
    wandb.teardown()  # its service writes the last records just after `finish` returns


def track(run_dir, state="completed", exit_code=0, rows=ROWS, **arguments):
    """What the offline file of a run with `rows` holds."""
    tracker = begin(run_dir, **arguments)
    for row in rows:
        tracker.log(row)
    end(tracker, state, exit_code)
    return wandb_file.read_all(run_dir)[-1]


def plain(rows):
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run as a sweep's job leaves it."""
    run_dir = tmp_path_factory.mktemp("outputs") / "14-05-09-123456_qwen3_tiny-openai_sft-lr6e-5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("HOME", str(run_dir.parent))
        patch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.1")
        overrides = ["optimizer.lr=6e-5", "+trainer.seed=1", "debug=fast", "optimizer.betas=[0.9,0.99]", "checkpoint=none"]
        return track(run_dir, overrides=overrides, project="chats", group="sweep-1", tags=["baseline"])


def test_a_step_and_its_evaluation_are_one_row_by_step(found):
    assert plain(found.history) == [
        {"train/step": 1, "train/loss": 2.5, "throughput/tgs": 90.0},
        {"train/step": 2, "train/loss": 2.0, "throughput/tgs": 120.0, "eval/loss": 2.25},
        {"train/step": 3, "train/loss": 1.5, "throughput/tgs": 110.0, "eval/loss": 2.75},
    ]
    assert [row["_step"] for row in found.history] == [1, 2, 3]
    assert any(metric.glob_name == "*" and metric.step_metric == "train/step" for metric in found.metrics)


def test_the_run_can_be_found_by_group_name_tags_and_type(found):
    run = found.run
    assert (run.project, run.run_group, run.job_type) == ("chats", "sweep-1", "train")
    assert run.display_name == "qwen3_tiny-openai_sft-lr6e-5"  # its directory's name without the time
    assert list(run.tags) == ["baseline", "qwen3_tiny", "openai_sft", "fast"]


def test_config_is_nested_and_overrides_can_be_searched_key_by_key(found):
    config = found.config
    assert config["optimizer"] == {"lr": 6e-5}
    assert config["overrides"] == {"optimizer": {"lr": "6e-5", "betas": "[0.9,0.99]"}, "trainer": {"seed": "1"}}
    assert config["options"] == {"model": "qwen3_tiny", "data": "openai_sft", "optimizer": "adamw", "debug": "fast"}
    assert config["code"] == {"commit": "a" * 40, "dirty": True}
    assert config["run_dir"].endswith("/14-05-09-123456_qwen3_tiny-openai_sft-lr6e-5")


def test_the_summary_has_the_best_and_the_last_values(found):
    summary = found.summary
    assert (summary["eval/best_loss"], summary["eval/best_step"], summary["throughput/best_tgs"]) == (2.25, 2, 120.0)
    assert (summary["train/loss"], summary["eval/loss"], summary["train/step"]) == (1.5, 2.75, 3)


def test_system_metrics_are_recorded(found):
    assert any("proc.memory.rssMB" in stats for stats in found.stats)


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("interrupted", 130)])
def test_it_ends_as_the_run_ended(tmp_path, state, code):
    found = track(tmp_path / "run", state, code)
    assert found.exit.exit_code == code
    assert found.summary["state"] == state


def test_an_id_that_a_loss_of_power_has_spoilt_is_replaced(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id").write_bytes(b"\0\0\0\0")
    found = track(tmp_path, "completed", 0)
    assert re.fullmatch(r"\w{12}", found.run.run_id)
    assert (tmp_path / "wandb" / "run_id").read_text() == found.run.run_id


def test_a_resumed_run_goes_on_with_the_same_id_steps_and_summary(tmp_path):
    """After step 3 it goes back to its checkpoint of step 2, whose rows are in metrics.jsonl."""
    first = track(tmp_path, "interrupted", 130)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    second = track(tmp_path, start_step=2, rows=[{"train/step": 3, "train/loss": 1.4, "throughput/tgs": 60.0}])
    assert second.run.run_id == first.run.run_id
    assert [row["_step"] for row in second.history] == [3]
    summary = second.summary
    assert (summary["eval/best_loss"], summary["eval/best_step"], summary["throughput/best_tgs"]) == (2.25, 2, 120.0)
    assert (summary["train/loss"], summary["eval/loss"], summary["state"]) == (1.4, 2.25, "completed")


def test_nothing_is_better_than_a_loss_of_zero():
    summary = Summary()
    for number, loss in enumerate((0.0, 0.5), 1):
        summary.improve({"train/step": number, "eval/loss": loss})
    assert summary.best == {"eval/best_loss": 0.0, "eval/best_step": 1}


def test_values_that_are_not_numbers_are_never_the_best():
    summary = Summary()
    for loss in (math.nan, math.inf, 3.0, math.nan, None):
        summary.improve({"train/step": 1, "eval/loss": loss, "throughput/tgs": loss})
    assert summary.best == {"eval/best_loss": 3.0, "eval/best_step": 1, "throughput/best_tgs": math.inf}


def test_overrides_of_a_whole_group_and_of_one_of_its_keys_do_not_clash():
    assert nested_overrides(["tracking.wandb={mode:offline}", "tracking.wandb.tags=[a,b]", "model=hf", "model.pretrained=DIR"]) == {
        "tracking": {"wandb": {"tags": "[a,b]"}},
        "model": {"pretrained": "DIR"},
    }


# --- artifacts ---


def commit(run_dir, *steps, folder="hf"):
    for step in steps:
        directory = run_dir / folder / f"step-{step}"
        directory.mkdir(parents=True)
        (directory / "weights").write_text(f"weights of {folder} after {step}")
        (directory / "manifest.json").write_text("{}")
    (run_dir / folder / ".step-9.tmp").mkdir()


def logged(found):
    return {artifact.name.partition("-")[0]: (json.loads(artifact.metadata)["step"], set(artifact.aliases)) for artifact in found.artifacts}


def test_export_and_checkpoint_of_the_best_step_are_logged_whole(tmp_path):
    commit(tmp_path, 2, 3)
    commit(tmp_path, 3, folder="checkpoints")  # that of step 2, the best, is gone
    found = track(tmp_path, artifacts="all")
    assert logged(found) == {"export": (2, {"best", "latest"}), "checkpoint": (3, {"latest"})}
    assert {artifact.type for artifact in found.artifacts} == {"model"}
    files = {entry.path: entry.local_path for entry in found.artifacts[0].manifest.contents}
    assert set(files) == {"weights", "manifest.json"}
    assert files["weights"] == str(tmp_path / "hf" / "step-2" / "weights")  # by reference: nothing is copied


def test_nothing_is_uploaded_unless_asked_for_and_completed(tmp_path):
    for name, state, artifacts in (("unasked", "completed", "none"), ("failed", "failed", "export")):
        commit(tmp_path / name, 1)
        assert track(tmp_path / name, state, artifacts=artifacts).artifacts == []


def test_an_artifact_that_cannot_be_logged_costs_a_warning(tmp_path, monkeypatch, caplog):
    commit(tmp_path, 3)
    monkeypatch.setattr("wandb.Artifact.add_dir", fail)
    found = track(tmp_path, artifacts="all")
    assert (found.artifacts, found.exit.exit_code, found.summary["state"]) == ([], 0, "completed")
    assert "the export was not uploaded: the disk is gone" in caplog.text
    assert "there is no checkpoint" in caplog.text


def fail(*args, **kwargs):
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("keep", "direction", "other", "uploads"),
    [
        ("best", "minimize", ("completed", 3.0), True),
        ("best", "minimize", ("completed", 2.5), False),
        ("best", "minimize", ("failed", 2.5), True),
        ("best", "maximize", ("completed", 2.5), True),
        ("none", "minimize", ("completed", 3.0), False),
        ("all", "minimize", ("completed", 2.5), True),
    ],
)
def test_in_a_sweep_only_jobs_whose_files_stay_are_uploaded(tmp_path, keep, direction, other, uploads):
    (tmp_path / "sweep.json").write_text(json.dumps({"keep": keep, "metric": "eval/loss", "direction": direction}))
    (tmp_path / "0_other").mkdir()
    (tmp_path / "0_other" / "status.json").write_text(json.dumps({"state": other[0], "metrics": {"eval/loss": other[1]}}))
    (tmp_path / "2_damaged").mkdir()
    (tmp_path / "2_damaged" / "status.json").write_bytes(b"\0")
    commit(tmp_path / "1_own", 3)
    found = track(tmp_path / "1_own", artifacts="export")  # it ends with an eval/loss of 2.75
    assert bool(found.artifacts) == uploads
    assert "sweep" in found.run.tags


# --- W&B's own sweeps ---


def test_an_agents_run_is_the_one_it_named(tmp_path, monkeypatch):
    (tmp_path / "parameters.yaml").write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.0002\n")
    for name, value in {
        "SWEEP_ID": "sw1",
        "RUN_ID": "run77",
        "PROJECT": "theirs",
        "SWEEP_PARAM_PATH": tmp_path / "parameters.yaml",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    wandb.teardown()  # it reads its environment once
    found = track(tmp_path / "run", project="ours", group="ours")
    assert (found.run.sweep_id, found.run.run_id, found.run.project, found.run.run_group) == ("sw1", "run77", "theirs", "")
    assert found.config["optimizer.lr"] == 0.0002
    assert (tmp_path / "run" / "wandb" / "run_id").read_text() == "run77"


# --- online or not ---


def test_an_online_run_that_resumes_goes_on_with_the_curve_on_the_server(tmp_path, monkeypatch, capfd):
    """It stopped in step 3's evaluation and goes back to step 1."""
    with wandb_server.serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        tracker = begin(tmp_path)
        for row in ROWS[:-1]:
            tracker.log(row)
        end(tracker, "interrupted", 130)
        (history,) = server.history.values()
        assert [row["_step"] for row in history] == [1, 2, 3]

        tracker = begin(tmp_path, start_step=1)
        for row in (*ROWS[1:], {"train/step": 4, "train/loss": 1.25}):
            tracker.log(row)
        # of step 3, which the server has already, but without an evaluation
        wait_for(lambda: dict(tracker.run.summary).get("eval/loss") == 2.75, seconds=20)
        end(tracker)
    (history,) = server.history.values()
    assert [(row["_step"], row["train/loss"]) for row in history] == [(1, 2.5), (2, 2.0), (3, 1.5), (4, 1.25)]
    assert "monotonically" not in capfd.readouterr().err


def test_a_server_that_cannot_be_reached_makes_the_run_offline(tmp_path, monkeypatch, caplog):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr("xtuner_hydra.tracking.wandb.ONLINE_SECONDS", 1)
        found = track(tmp_path / "run")
    assert [row["train/step"] for row in found.history] == [1, 2, 3]
    assert "wandb sync" in caplog.text


def test_training_does_not_wait_for_wandb(tmp_path, monkeypatch):
    """Nor for the server that does not answer."""
    goes_on, init = threading.Event(), wandb.init

    def slow(**arguments):
        assert goes_on.wait(60)
        return init(**arguments)

    monkeypatch.setattr(wandb, "init", slow)
    tracker = begin(tmp_path / "run")
    for row in ROWS:
        tracker.log(row)
    goes_on.set()
    end(tracker)
    assert [row["train/step"] for row in wandb_file.read_all(tmp_path / "run")[-1].history] == [1, 2, 3]


@pytest.mark.parametrize(
    ("mode", "environment", "netrc", "expected"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "0123"}, "", "online"),
        ("auto", {"WANDB_API_KEY": "0123", "WANDB_MODE": "offline"}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "0123", "WANDB_MODE": "disabled"}, "", "offline"),
        ("auto", {}, "machine api.wandb.ai login user password 0123", "online"),
        ("auto", {}, "machine other.example login user password 0123", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.other.example:8080"}, "machine api.wandb.ai login user password 0123", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.other.example:8080"}, "machine wandb.other.example login user password 0123", "online"),
        ("auto", {}, "no netrc at all", "offline"),
        ("offline", {"WANDB_API_KEY": "0123"}, "", "offline"),
        ("online", {"WANDB_API_KEY": "0123"}, "", "online"),
    ],
)
def test_a_run_is_online_when_a_key_is_there_and_nothing_speaks_against_it(tmp_path, monkeypatch, mode, environment, netrc, expected):
    (tmp_path / "netrc").write_text(netrc + "\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(WandbConfig(mode=mode)) == expected


def test_without_netrc_variable_the_home_directory_is_looked_into(tmp_path, monkeypatch):
    monkeypatch.delenv("NETRC")
    assert resolve_mode(WandbConfig()) == "offline"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    assert resolve_mode(WandbConfig()) == "online"


def test_online_without_a_key_is_refused_instead_of_asking():
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        resolve_mode(WandbConfig(mode="online"))


def test_what_fails_while_wandb_opens_costs_a_warning_and_not_the_run(tmp_path, monkeypatch, caplog):
    """It opens beside the first step; a mode that is asked for by name is waited for."""

    def fail(**arguments):
        raise RuntimeError("no room")

    monkeypatch.setattr(wandb, "init", fail)
    trackers = Trackers([tracker := begin(tmp_path, mode="auto")])
    trackers.log(ROWS[0])
    wait_for(lambda: tracker._waiting[0].done(), seconds=20)
    trackers.log(ROWS[1])
    assert [record.message for record in caplog.records] == ["WandbTracker failed and is left out from now on: no room"]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(RuntimeError, match="no room"):
        begin(tmp_path / "insists", mode="online")
