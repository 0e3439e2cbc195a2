"""A run, a sweep or a configuration that someone else made runs no code of theirs, unless it is typed in this command or --trust is said."""

import json
import shutil

import pytest
from conftest import CommandLine

from xtuner_hydra.results.sweep import Job, SweepPlan

FORMAT = """
open("{marker}", "a").write("imported ")

def pair(record):
    return [{{"role": "user", "content": record["q"]}}, {{"role": "assistant", "content": record["a"]}}]
"""


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    """A directory with a run whose data.format is a function, with a checkpoint and an export."""
    cli = CommandLine(tmp_path_factory.mktemp("strangers"))
    (cli.directory / "theirs.py").write_text(FORMAT.format(marker=cli.directory / "marker"))
    (cli.directory / "pairs.jsonl").write_text("".join(json.dumps({"q": f"question {n}", "a": "answer"}) + "\n" for n in range(8)))
    done = cli(
        *("debug=fast", "data=openai", "data.path=pairs.jsonl", "data.eval_path=pairs.jsonl", "data.format=theirs:pair", "tracking=none"),
        *("trainer.total_steps=1", "checkpoint.interval=-1", "checkpoint.hf_interval=-1", "hydra.run.dir=run"),
    )
    assert done.code == 0, done.text
    assert (cli.directory / "marker").exists()
    shutil.rmtree(cli.directory / ".cache")
    return cli


@pytest.fixture(autouse=True)
def unmarked(cli):
    (cli.directory / "marker").unlink(missing_ok=True)


def imported(cli):
    return (cli.directory / "marker").exists()


@pytest.mark.parametrize("verb", ["rerun", "evaluate"])
def test_a_function_that_a_run_names_needs_trust(cli, verb):
    words = [verb, "run", *(["hydra.run.dir=again"] if verb == "rerun" else [])]
    done = cli(*words)
    assert done.code == 2
    assert "data.format=theirs:pair: runs the function theirs:pair" in done.err
    assert "--trust" in done.err
    assert not imported(cli)
    done = cli(*words, "--trust")
    assert done.code == 0, done.text
    assert imported(cli)


def test_a_function_that_is_typed_is_trusted(cli):
    done = cli("evaluate", "run", "data.format=theirs:pair", "data.cache_dir=other")
    assert done.code == 0, done.text
    assert imported(cli)


@pytest.mark.parametrize(
    "words", [["chat", "run", "-p", "hi", "--max-new-tokens", "1"], ["export", "run", "--to", "to"], ["report", "run"]]
)
def test_verbs_that_need_no_data_import_nothing(cli, words):
    done = cli(*words)
    assert done.code == 0, done.text
    assert not imported(cli)


@pytest.mark.parametrize("verb", [[], ["plan"], ["data"], ["-m", "optimizer.lr=1e-3,1e-4"]])
def test_a_function_that_a_config_file_names_needs_trust(cli, verb):
    (cli.directory / "conf" / "data").mkdir(parents=True, exist_ok=True)
    (cli.directory / "conf" / "data" / "theirs.yaml").write_text("path: pairs.jsonl\nformat: theirs:pair\n")
    done = cli(*verb, "debug=fast", "--config-dir", "conf", "data=theirs")
    assert done.code == 2
    assert "data.format=theirs:pair: runs the function" in done.err
    assert "data/theirs.yaml" in done.err
    assert not imported(cli)


def test_a_function_that_a_recorded_sweep_names_needs_trust(cli):
    sweep = cli.directory / "sweep"
    sweep.mkdir(exist_ok=True)
    overrides = ["debug=fast", "data=openai", "data.path=pairs.jsonl", "data.format=theirs:pair", "optimizer.lr=1e-3,1e-4"]
    jobs = [Job(0, "0_lr0.001", ["optimizer.lr=1e-3"], "a"), Job(1, "1_lr0.0001", ["optimizer.lr=1e-4"], "b")]
    plan = SweepPlan(
        overrides, "grid", "train/loss", "minimize", "best", ["optimizer.lr"], 2, jobs, state="killed", directory=str(cli.directory)
    )
    plan.save(sweep)
    done = cli("sweep.resume=sweep")
    assert done.code == 2
    assert "runs the function theirs:pair" in done.err
    assert not imported(cli)
    done = cli("plan", "sweep.resume=sweep", "--trust")
    assert imported(cli)
    assert "runs the function" not in done.err


COMMANDS = "# @package _global_\nhydra:\n  launcher:\n    setup: ['touch marker']\n"
CALLBACK = "# @package _global_\nhydra:\n  callbacks:\n    theirs: {_target_: theirs.pair}\n"
PARAMETER = "# @package _global_\nhydra:\n  sweeper:\n    params: {a: {_target_: theirs.pair}}\n"


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (COMMANDS, ["-m", "optimizer.lr=1e-3,1e-4", "hydra/launcher=submitit_local"], "hydra.launcher.setup=['touch marker']: goes into"),
        (CALLBACK, [], "hydra.callbacks.theirs._target_: names code to call"),
        (CALLBACK, ["--cfg", "job"], "hydra.callbacks.theirs._target_: names code to call"),
        (PARAMETER, ["-m", "optimizer.lr=1e-3,1e-4"], "hydra.sweeper.params.a._target_: names code to call"),
        ("# @package _global_\nmodel: {_target_: theirs.pair}\n", [], "model._target_: names code to call (set in experiment/theirs.yaml)"),
        ("# @package _global_\noptimizer:\n  lr: !!python/object/apply:theirs.pair []\n", [], "python/object/apply:theirs.pair"),
    ],
)
def test_a_config_file_runs_no_code(cli, content, words, message):
    (cli.directory / "conf" / "experiment").mkdir(parents=True, exist_ok=True)
    (cli.directory / "conf" / "experiment" / "theirs.yaml").write_text(content)
    done = cli("debug=fast", "--config-dir", "conf", "experiment=theirs", *words)
    assert done.code == 2, done.text
    assert message in done.err
    assert "Traceback" not in done.text
    assert not imported(cli)


def test_a_config_file_imports_no_package_to_search_in(cli):
    (cli.directory / "theirs_package").mkdir(exist_ok=True)
    (cli.directory / "theirs_package" / "__init__.py").write_text(FORMAT.format(marker=cli.directory / "marker"))
    (cli.directory / "conf").mkdir(exist_ok=True)
    (cli.directory / "conf" / "mine.yaml").write_text("defaults: [config]\nhydra:\n  searchpath: [pkg://theirs_package]\n")
    done = cli("debug=fast", "--config-dir", "conf", "--config-name", "mine")
    assert done.code == 2
    assert "pkg://theirs_package (set in mine.yaml) runs a package's code" in done.err
    assert not imported(cli)


@pytest.mark.parametrize(
    ("override", "message"),
    [("hydra.job.name=../../x", "hydra.job.name=../../x: is a path"), ("tracking.wandb.project=../x", "tracking.wandb.project=../x: ")],
)
def test_names_lead_nowhere(cli, override, message):
    done = cli("debug=fast", override)
    assert done.code == 2
    assert message in done.err


def test_a_sweeps_jobs_stay_in_its_directory(cli):
    done = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e-4", "hydra.sweep.subdir=../${hydra.job.num}")
    assert done.code == 2
    assert "hydra.sweep.subdir=../0: is a path" in done.err
