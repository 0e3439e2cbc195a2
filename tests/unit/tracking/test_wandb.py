"""The offline file that W&B writes, read back with W&B's own reader."""

import json
from types import SimpleNamespace

import pytest

from xtuner_hydra.config.schema import WandbConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.tracking.wandb import WandbTracker, resolve_mode


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """No key, no netrc, no settings of the person who runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def records(run_dir):
    """What an offline run holds: one record of each kind, and the lists of history rows and defined metrics."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    found = SimpleNamespace(history=[], metrics=[], summary={})
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif kind == "metric":
            found.metrics.append(record.metric)
        elif kind == "summary":
            found.summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
        else:
            setattr(found, kind, getattr(record, kind))
    return found


def track(run_dir, state, exit_code):
    run_dir.mkdir()
    config = WandbConfig(project="chats", group="sweep-1", tags=["baseline"])
    tracker = WandbTracker(config, run_dir, {"optimizer": {"lr": 6e-5}}, ["optimizer.lr=6e-5"])
    tracker.log({"train/step": 1, "train/loss": 2.5, "throughput/mfu": None})
    tracker.log({"train/step": 2, "eval/loss": 2.25})
    tracker.finish(state, exit_code)
    return records(run_dir)


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
    config = {item.key: json.loads(item.value_json) for item in found.run.config.update}
    assert config["optimizer"] == {"lr": 6e-5}
    assert config["overrides"] == ["optimizer.lr=6e-5"]
    assert any(metric.glob_name == "*" and metric.step_metric == "train/step" for metric in found.metrics)


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("interrupted", 130)])
def test_it_ends_as_the_run_ended(tmp_path, state, code):
    found = track(tmp_path / "run", state, code)
    assert found.exit.exit_code == code
    assert found.summary["state"] == state


def test_auto_goes_online_only_with_a_key(tmp_path, monkeypatch):
    assert resolve_mode(WandbConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert resolve_mode(WandbConfig()) == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert resolve_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_mode(WandbConfig()) == "offline"


def test_online_without_a_key_is_refused_instead_of_asking():
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        resolve_mode(WandbConfig(mode="online"))
