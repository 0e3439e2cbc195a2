"""The offline file that W&B writes, read back record by record; and when a run goes online."""

import os
import socket

import pytest
import wandb
import wandb_file

from xtuner_hydra.config.schema import WandbConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.tracking.wandb import WandbTracker, resolve_mode


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """No key, no netrc, no settings of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def track(run_dir, state, exit_code):
    run_dir.mkdir()
    config = WandbConfig(project="chats", group="sweep-1", tags=["baseline"])
    tracker = WandbTracker(config, run_dir, {"optimizer": {"lr": 6e-5}}, ["optimizer.lr=6e-5"])
    tracker.log({"train/step": 1, "train/loss": 2.5, "throughput/mfu": None})
    tracker.log({"train/step": 2, "eval/loss": 2.25})
    tracker.finish(state, exit_code)
    wandb.teardown()  # its service writes the last records just after `finish` returns
    return wandb_file.read(run_dir)


def test_an_offline_run_holds_rows_config_group_and_tags(tmp_path):
    found = track(tmp_path / "run", "completed", 0)
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in found.history]
    assert rows == [{"train/step": 1, "train/loss": 2.5}, {"train/step": 2, "eval/loss": 2.25}]
    assert (found.run.project, found.run.run_group, list(found.run.tags), found.run.display_name) == (
        "chats",
        "sweep-1",
        ["baseline"],
        "run",
    )
    assert found.config["optimizer"] == {"lr": 6e-5}
    assert found.config["overrides"] == ["optimizer.lr=6e-5"]
    assert any(metric.glob_name == "*" and metric.step_metric == "train/step" for metric in found.metrics)


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("interrupted", 130)])
def test_it_ends_as_the_run_ended(tmp_path, state, code):
    found = track(tmp_path / "run", state, code)
    assert found.exit.exit_code == code
    assert found.summary["state"] == state


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path):
    ids = []
    for _ in range(2):
        tracker = WandbTracker(WandbConfig(), tmp_path, {}, [])
        ids.append(tracker.run.id)
        tracker.finish("completed", 0)
    assert ids[0] == ids[1]


def test_a_server_that_cannot_be_reached_makes_the_run_offline(tmp_path, monkeypatch, caplog):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr("xtuner_hydra.tracking.wandb.ONLINE_SECONDS", 1)
        found = track(tmp_path / "run", "completed", 0)
    assert [row["train/step"] for row in found.history] == [1, 2]
    assert "wandb sync" in caplog.text


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
