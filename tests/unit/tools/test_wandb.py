"""`wandb dashboard` defines panels of what runs really have; `wandb sync` pushes with W&B's own program, to a server that listens here."""

import builtins
import json
import os
import shutil

import pytest
import wandb
import wandb_file
import wandb_server
from conftest import CommandLine

from xtuner_hydra import run_dir
from xtuner_hydra.__main__ import main
from xtuner_hydra.config.schema import WandbConfig
from xtuner_hydra.config.strict import known_keys
from xtuner_hydra.results.sweep import Job, SweepPlan
from xtuner_hydra.tracking.wandb import WandbTracker

KEY = "0" * 40


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """No key, no netrc, no settings of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(monkeypatch):
    with wandb_server.serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        wandb.teardown()


# --- dashboard ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the real command line."""
    cli = CommandLine(tmp_path_factory.mktemp("run"))
    done = cli("debug=fast", "checkpoint=none", "hydra.run.dir=run")
    assert done.code == 0, done.text
    return wandb_file.read(cli.directory / "run")


@pytest.fixture
def spec(tmp_path, capsys):
    """The definition's view, as written without a login."""
    assert main(["wandb", "dashboard", "--project", "chats", "--to", "board.json"]) == 0
    return json.loads((tmp_path / "board.json").read_text())


def settings(spec, kind=None):
    """The settings of all panels, or of those of a kind."""
    return [config for section in panels(spec).values() for view, config in section if kind in (None, view)]


def panels(spec):
    """Every panel's kind and settings, by section."""
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [(panel["viewType"], panel["config"]) for panel in section["panels"]] for section in sections}


def test_without_a_login_the_definition_is_written_with_the_way_to_push_it(tmp_path, capsys):
    assert main(["wandb", "dashboard", "--project", "chats", "--entity", "us"]) == 0
    said = capsys.readouterr().out
    assert "wandb_dashboard.json" in said
    assert "wandb login" in said
    assert "xtuner-hydra wandb dashboard --project chats --entity us" in said
    written = json.loads((tmp_path / "wandb_dashboard.json").read_text())
    assert (written["project"], written["entity"]) == ("chats", "us")


def test_it_has_its_sections_in_order(spec):
    assert list(panels(spec)) == ["training", "evaluation", "sweep comparison", "throughput", "memory"]


def test_every_panel_shows_what_a_run_has(spec, run):
    """Metrics of the history, or of the summary, and keys of the config, as W&B's file of a real run holds them."""
    logged = {name for row in run.history for name in row}
    shown = set()
    for config in settings(spec):
        shown |= {*config.get("metrics", []), config.get("xAxis"), config.get("targetKey")}
    fields = [column["accessor"] for config in settings(spec) for column in config.get("columns", [])]
    fields += [config[axis] for config in settings(spec, "Scatter Plot") for axis in ("xAxis", "yAxis")]
    shown -= {None, *fields}
    assert {"train/loss", "eval/loss", "train/lr", "train/grad_norm", "throughput/tgs", "memory/max_gb"} <= shown
    assert shown <= logged | set(run.summary)
    for field in fields:
        kind, _, name = field.partition(":")
        assert name in run.summary if kind == "summary" else name.replace(".value.", ".") in known_keys(), field


def test_sweeps_are_compared_by_parallel_coordinates_and_rate_against_loss(spec):
    comparison = dict(panels(spec)["sweep comparison"])
    assert [column["accessor"] for column in comparison["Parallel Coordinates Plot"]["columns"]] == [
        "config:optimizer.value.lr",
        "config:data.value.pack_max_length",
        "config:trainer.value.global_batch_size",
        "summary:throughput/best_tgs",
        "summary:eval/best_loss",
    ]
    scatter = comparison["Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"], scatter["xAxisLogScale"]) == ("config:optimizer.value.lr", "summary:eval/best_loss", True)
    assert comparison["Run Comparer"]["diffOnly"] is True


def test_curves_are_over_our_steps(spec):
    assert spec["spec"]["section"]["settings"]["xAxis"] == "train/step"
    assert {config["xAxis"] for config in settings(spec, "Run History Line Plot")} == {"train/step", "train/total_tokens"}


def test_with_a_login_it_is_pushed_to_the_accounts_own_entity(server, spec, capsys):
    assert main(["wandb", "dashboard", "--project", "chats"]) == 0
    (view,) = server.views
    assert (view["projectName"], view["entityName"], view["displayName"]) == ("chats", "me", "xtuner_hydra")
    pushed = {"spec": json.loads(view["spec"])}
    assert panels(pushed) == panels(spec)


def test_what_the_server_says_against_it_is_one_sentence(server, capsys, monkeypatch):
    monkeypatch.setattr(wandb_server.Server, "answer", lambda *args: {"errors": [{"message": "no such account"}]})
    assert main(["wandb", "dashboard"]) == 2
    assert "W&B did not take it" in capsys.readouterr().err


def test_without_wandb_workspaces_it_says_how_to_install_it(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("wandb_workspaces"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["wandb", "dashboard"]) == 2
    assert "pip install 'xtuner-hydra[dashboards]'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused(capsys):
    assert main(["wandb", "dashboard", "--to", "nowhere/board.json"]) == 2
    assert "nowhere/board.json" in capsys.readouterr().err


# --- sync ---


def offline_run(directory, *, starts=1, state="completed", group=None):
    """A run directory with the offline files of so many starts of one W&B run."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("{}\n")
    for start in range(starts):
        tracker = WandbTracker(WandbConfig(mode="offline", group=group, artifacts="export"), directory, {}, [], start)
        tracker.log({"train/step": start + 1, "train/loss": 1.0 / (start + 1)})
        if start == starts - 1:
            export = directory / "hf" / "step-1"
            export.mkdir(parents=True)
            (export / "manifest.json").write_text("{}")
        tracker.finish("completed" if start == starts - 1 else "interrupted", 0)
        wandb.teardown()
    run_dir.write_status(directory, state)
    return directory


@pytest.fixture
def sweep(tmp_path):
    """A sweep whose jobs' names, sorted as text, are not in their order. Its first job was resumed, its third never started."""
    directory = tmp_path / "sweep"
    names = ["2_lr1e-5", "10_lr2e-5", "11_lr3e-5", "100_lr4e-5"]
    jobs = [Job(number, name, [], "") for number, name in enumerate(names)]
    directory.mkdir()
    SweepPlan([], "grid", "eval/loss", "minimize", "all", [], len(jobs), jobs).save(directory)
    for number in (0, 1, 3):
        offline_run(directory / names[number], starts=2 if number == 0 else 1, group="sweep")
    run_dir.write_status(directory / names[0], "completed")
    return directory


def test_a_sweep_is_pushed_in_the_order_of_its_jobs_with_group_steps_and_artifacts(server, sweep, capsys):
    ids = {name: (sweep / name / "wandb" / "run_id").read_text() for name in ("2_lr1e-5", "10_lr2e-5", "100_lr4e-5")}
    assert main(["wandb", "sync", str(sweep)]) == 0
    assert list(dict.fromkeys(run["name"] for run in server.runs)) == list(ids.values())
    assert {(run["displayName"], run["groupName"]) for run in server.runs if run.get("displayName")} == {(name, "sweep") for name in ids}
    assert [row["train/step"] for row in server.history[ids["2_lr1e-5"]]] == [1, 2]  # both starts, one curve
    assert server.artifacts == [f"export-{number}" for number in ids.values()]
    assert capsys.readouterr().out.count(": pushed") == 3

    server.runs.clear()
    assert main(["wandb", "sync", str(sweep)]) == 0
    assert "nothing offline to push" in capsys.readouterr().out
    assert server.runs == []


def test_what_a_sweep_has_removed_does_not_keep_the_run_back(server, sweep):
    """The export of a job that was the best for a while and was overtaken."""
    shutil.rmtree(sweep / "2_lr1e-5" / "hf")
    assert main(["wandb", "sync", str(sweep)]) == 0
    kept = [(sweep / name / "wandb" / "run_id").read_text() for name in ("10_lr2e-5", "100_lr4e-5")]
    assert server.artifacts == [f"export-{number}" for number in kept]
    assert len({run["name"] for run in server.runs}) == 3


def test_one_that_fails_is_reported_and_the_others_are_pushed(server, sweep, capfd):
    server.refuses.add("2_lr1e-5")
    assert main(["wandb", "sync", str(sweep)]) == 1
    out = capfd.readouterr().out
    assert f"1/3 {sweep}/2_lr1e-5: not pushed" in out
    assert f"2/3 {sweep}/10_lr2e-5: pushed" in out
    assert f"3/3 {sweep}/100_lr4e-5: pushed" in out


def test_without_a_key_nothing_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.run", None)
    offline_run(tmp_path / "run")
    capsys.readouterr()
    assert main(["wandb", "sync", "run"]) == 2
    err = capsys.readouterr().err
    assert "WANDB_API_KEY" in err
    assert err.count("\n") == 1


def test_dry_run_lists_what_would_be_pushed_and_leaves_out_what_still_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("xtuner_hydra.tools.wandb.push", None)
    offline_run(tmp_path / "one")
    offline_run(tmp_path / "two", state="running")  # by this process
    capsys.readouterr()
    assert main(["wandb", "sync", "--dry-run", "two", "one"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "two: still running, left out"
    assert len(others) == 1
    assert others[0].startswith("one/wandb/offline-run-")


def test_what_is_neither_run_nor_sweep_is_refused(tmp_path, capsys):
    assert main(["wandb", "sync", str(tmp_path)]) == 2
    assert "neither a run's directory" in capsys.readouterr().err
