"""What the real command line leaves in W&B's offline file: after success, failure and Ctrl-C, after a resume, in a sweep, under W&B's agent."""

import os
import signal
from pathlib import Path

import pytest
import wandb_file
import yaml
from conftest import REPOSITORY, CommandLine, read_rows, read_status, wait_for

from xtuner_hydra.config.strict import known_keys

SECRET = "5ecre7" * 7
SWEEP_FILE = REPOSITORY / "scripts" / "wandb_sweep.yaml"


def plain(rows):
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def holding(directory, text):
    """Files below `directory` that hold `text`."""
    return [path for path in Path(directory).rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run with evaluations, an override and artifacts, of someone who has a key but wants to be offline."""
    cli = CommandLine(tmp_path_factory.mktemp("job"))
    cli.environment |= {"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}
    done = cli(
        *("debug=fast", "optimizer.lr=1e-3", "trainer.total_steps=4", "trainer.eval_interval=2", "tracking.wandb.tags=[mine]"),
        *("checkpoint.interval=2", "tracking.wandb.artifacts=all", "hydra.run.dir=run"),
    )
    assert done.code == 0, done.text
    return cli.directory / "run", wandb_file.read(cli.directory / "run")


def test_history_is_metrics_jsonl_by_step(job):
    run, found = job
    steps = {}
    for row in read_rows(run):
        steps.setdefault(row["train/step"], {}).update({name: value for name, value in row.items() if value is not None})
    assert plain(found.history) == list(steps.values())
    assert [row["_step"] for row in found.history] == [1, 2, 3, 4]


def test_summary_has_the_runs_best_and_last_values(job):
    run, found = job
    rows = read_rows(run)
    evaluations = {row["eval/loss"]: row["train/step"] for row in rows if "eval/loss" in row}
    summary = found.summary
    assert summary["eval/best_loss"] == min(evaluations)
    assert summary["eval/best_step"] == evaluations[min(evaluations)]
    assert summary["throughput/best_tgs"] == max(row["throughput/tgs"] for row in rows if "throughput/tgs" in row)
    assert summary["train/loss"] == rows[-2]["train/loss"]
    assert (summary["state"], found.exit.exit_code) == ("completed", 0)


def test_config_is_the_resolved_one_with_overrides_options_and_origin(job):
    run, found = job
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert {group: found.config[group] for group in resolved} == resolved
    assert found.config["overrides"]["optimizer"] == {"lr": "1e-3"}
    assert found.config["options"]["model"] == "qwen3_tiny"
    assert found.config["run_dir"] == str(run)
    assert list(found.run.tags) == ["mine", "qwen3_tiny", "openai_sft", "fast"]


def test_export_and_checkpoint_are_there_to_upload(job):
    _, found = job
    files = {artifact.name.partition("-")[0]: [entry.path for entry in artifact.manifest.contents] for artifact in found.artifacts}
    assert {"model.safetensors", "config.json", "manifest.json"} <= set(files["export"])
    assert any(name.endswith("rank-0.safetensors") for name in files["checkpoint"])


def test_system_metrics_and_the_code_are_known(job):
    _, found = job
    assert found.stats
    assert found.config["code"] == {"commit": None, "dirty": None}  # the test's directory is no repository


def test_the_key_is_nowhere_in_the_run_directory(job):
    run, _ = job
    assert holding(run, "qwen3")  # the search works
    assert holding(run, SECRET) == []


def test_a_failed_run_ends_with_its_code(cli):
    done = cli("debug=fast", "optimizer.lr=1e30", "checkpoint=none", "hydra.run.dir=run")
    assert done.code == 1, done.text
    found = wandb_file.read(cli.directory / "run")
    assert (found.exit.exit_code, found.summary["state"]) == (1, "failed")
    assert [row["train/step"] for row in found.history] == [1]


def test_ctrl_c_and_a_resume_make_one_run_with_the_right_steps(cli):
    """Ctrl-C in a terminal reaches every process of the group, W&B's service too."""
    run = cli.directory / "run"
    command = ("debug=fast", "trainer.total_steps=60", "checkpoint.interval=20", "checkpoint.hf_interval=null", "data.eval_path=null")
    process = cli.start(*command, "hydra.run.dir=run")
    wait_for(lambda: (run / "checkpoints" / "step-20").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    stopped = read_status(run)["step"]
    (first,) = wandb_file.read_all(run)
    assert (first.exit.exit_code, first.summary["state"]) == (130, "interrupted")
    assert [row["train/step"] for row in first.history] == list(range(1, stopped + 1))

    done = cli(*command, "hydra.run.dir=run", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    first, second = wandb_file.read_all(run)
    assert second.run.run_id == first.run.run_id
    steps = [row["_step"] for row in second.history]
    assert steps == list(range(stopped + 1, 61))  # the last finished step was saved
    assert plain(second.history) == read_rows(run)[steps[0] - 1 :]
    assert second.summary["throughput/best_tgs"] == max(row["throughput/tgs"] for row in read_rows(run))
    assert (second.exit.exit_code, second.summary["state"]) == (0, "completed")


def test_jobs_of_a_sweep_share_its_group(cli):
    done = cli("-m", "debug=fast", "optimizer.lr=1e-4,2e-4", "data.eval_path=null", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.text
    found = [wandb_file.read(path.parent) for path in sorted((cli.directory / "sweep").glob("*/config.yaml"))]
    assert {one.run.run_group for one in found} == {"sweep"}
    assert sorted(float(one.config["overrides"]["optimizer"]["lr"]) for one in found) == [1e-4, 2e-4]
    assert [one.run.display_name for one in found] == sorted(path.parent.name for path in (cli.directory / "sweep").glob("*/config.yaml"))
    assert all("lr0.000" in one.run.display_name for one in found)


# --- scripts/wandb_sweep.yaml ---


def chosen(sweep):
    """What an agent might draw."""
    return {
        key: {"value": one.get("value", one["values"][0] if "values" in one else one.get("min"))}
        for key, one in sweep["parameters"].items()
    }


def test_the_sweep_file_opens_with_its_usage_and_names_known_keys_and_metrics(job):
    _, found = job
    sweep = yaml.safe_load(SWEEP_FILE.read_text())
    assert SWEEP_FILE.read_text().startswith("# wandb sweep scripts/wandb_sweep.yaml")
    assert set(sweep["parameters"]) <= set(known_keys())
    assert sweep["metric"]["name"] in found.history[-1]
    assert (sweep["method"], sweep["early_terminate"]["type"]) == ("bayes", "hyperband")


def test_the_command_that_an_agent_makes_of_it_is_accepted(cli):
    """The agent's own code fills in the command."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(SWEEP_FILE.read_text())
    macros = create_sweep_command_args({"args": chosen(sweep)})
    env, program, *command = create_sweep_command(sweep["command"])
    assert (env, program, command[:2]) == ("${env}", "python", ["-m", "xtuner_hydra"])
    assert command[2:] == ["${args_no_hyphens}"]
    done = cli("plan", *macros["args_no_hyphens"])
    assert done.code == 0, done.text


def test_a_run_that_an_agent_starts_is_the_sweeps(cli):
    parameters = cli.directory / "parameters.yaml"
    parameters.write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.0002\n")
    cli.environment |= {
        "WANDB_SWEEP_ID": "sw1",
        "WANDB_RUN_ID": "run77",
        "WANDB_PROJECT": "theirs",
        "WANDB_SWEEP_PARAM_PATH": str(parameters),
    }
    done = cli("debug=fast", "checkpoint=none", "data.eval_path=null", "optimizer.lr=0.0002", "hydra.run.dir=run")
    assert done.code == 0, done.text
    found = wandb_file.read(cli.directory / "run")
    assert (found.run.sweep_id, found.run.run_id, found.run.project) == ("sw1", "run77", "theirs")
    assert found.exit.exit_code == 0
