"""rerun: the same numbers to the last bit, from anywhere, on any number of ranks; and what stands in its way is said."""

import json
import shutil
from types import SimpleNamespace

import pytest
from chats import chat, write_lines
from conftest import CommandLine, read_rows, read_status

JOB = ("debug=fast", "data=openai", "data.path=data/chats.jsonl", "data.eval_path='~/held*.jsonl'", "tracking=none", "checkpoint=none")
EXACT = ("train/step", "train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/total_tokens", "eval/loss")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run on two threads whose data was given relative to where it was started and to the home directory."""
    cli = CommandLine(tmp_path_factory.mktemp("rerun"))
    (cli.directory / "data").mkdir()
    (cli.directory / "elsewhere").mkdir()
    write_lines(cli.directory / "data" / "chats.jsonl", [chat("x" * n) for n in range(1, 60)])
    write_lines(cli.directory / "held-out.jsonl", [chat("y" * n) for n in range(1, 9)])
    cli.environment["OMP_NUM_THREADS"] = "2"
    done = cli(*JOB, "hydra.run.dir=run")
    assert done.code == 0, done.text
    elsewhere = CommandLine(cli.directory / "elsewhere")
    elsewhere.environment |= {name: cli.environment[name] for name in ("XDG_CACHE_HOME", "HOME")}
    return SimpleNamespace(cli=cli, run=cli.directory / "run", elsewhere=elsewhere)


def exact(run):
    return [[row.get(name) for name in EXACT] for row in read_rows(run)]


def read_json(path):
    return json.loads(path.read_text())


def test_config_yaml_holds_absolute_paths(job):
    text = (job.run / "config.yaml").read_text()
    assert f"  path: {job.cli.directory}/data/chats.jsonl\n" in text
    assert f"  eval_path: {job.cli.directory}/held*.jsonl\n" in text


def test_changed_json_tells_what_was_chosen_and_nothing_else(job):
    changed = read_json(job.run / "changed.json")
    assert changed["trainer.total_steps"] == [None, 2]
    assert changed["data.path"][1] == f"{job.cli.directory}/data/chats.jsonl"
    assert {key.split(".")[0] for key in changed} == {"model", "data", "trainer", "checkpoint", "tracking"}


def test_a_rerun_from_elsewhere_repeats_every_bit(job):
    """With the run's own number of threads, whatever the environment says."""
    done = job.elsewhere.fresh("rerun", job.run)  # OpenMP counts its threads when it starts
    assert done.code == 0, done.text
    assert "not exactly the same" not in done.err
    (again,) = (job.elsewhere.directory / "outputs").glob("*/*_run")
    assert exact(again) == exact(job.run)
    assert len(exact(again)) == 3
    assert (again / "config.yaml").read_text() == (job.run / "config.yaml").read_text()
    assert (again / "overrides.yaml").read_text() == (job.run / "overrides.yaml").read_text()
    environment = read_json(again / "environment.json")
    assert (environment["threads"], environment["rerun_of"]) == (2, str(job.run))


def test_a_rerun_with_changes_says_what_else_is_not_the_same(job):
    old = job.cli.directory / "old"
    shutil.copytree(job.run, old)
    environment = read_json(old / "environment.json")
    environment["versions"]["torch"] = "2.0.0"
    (old / "environment.json").write_text(json.dumps(environment))
    done = job.cli("rerun", old, "optimizer.lr=1e-3", "trainer.total_steps=1", "hydra.run.dir=other")
    assert done.code == 0, done.text
    (line,) = [line for line in done.err.splitlines() if "not exactly the same" in line]
    assert line.startswith("not exactly the same: torch 2.0.0 then, ")
    assert '- "optimizer.lr=1e-3"' in (job.cli.directory / "other" / "overrides.yaml").read_text()
    assert read_json(job.cli.directory / "other" / "changed.json")["optimizer.lr"] == [6e-05, 0.001]
    assert read_status(job.cli.directory / "other")["step"] == 1


def test_changed_data_is_refused_and_nothing_is_made(job):
    data = job.cli.directory / "data" / "chats.jsonl"
    before = data.read_bytes()
    try:
        write_lines(data, [chat("z" * n) for n in range(1, 70)])
        done = job.cli("rerun", job.run, "hydra.run.dir=never")
    finally:
        data.write_bytes(before)
    assert done.code == 2
    assert f"{data} has changed; 59 samples then, 69 now" in done.err
    assert not (job.cli.directory / "never").exists()


@pytest.fixture(scope="module")
def two_ranks(job):
    done = job.cli(*JOB, "parallelism.nproc_per_node=2", "trainer.global_batch_size=2", "data.eval_path=null", "hydra.run.dir=two")
    assert done.code == 0, done.text
    return job.cli.directory / "two"


def test_two_ranks_are_repeated_by_two_ranks(job, two_ranks):
    done = job.elsewhere("rerun", two_ranks, "hydra.run.dir=two")
    assert done.code == 0, done.text
    assert exact(job.elsewhere.directory / "two") == exact(two_ranks)


def test_under_torchrun_every_rank_takes_part_with_the_runs_threads(job, two_ranks):
    done = job.elsewhere.torchrun(2, "rerun", two_ranks, "hydra.run.dir=torchrun")
    assert done.code == 0, done.text
    assert exact(job.elsewhere.directory / "torchrun") == exact(two_ranks)
    environment = read_json(job.elsewhere.directory / "torchrun" / "environment.json")
    assert (environment["threads"], environment["ranks"]) == (2, 2)


def test_a_refusal_under_torchrun_ends_all_ranks(job, two_ranks):
    done = job.elsewhere.torchrun(2, "rerun", two_ranks, "optimizer.lrr=1")
    assert done.code != 0
    assert done.text.count("optimizer.lrr: there is no such key") == 1
