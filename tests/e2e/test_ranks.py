"""Several ranks: by nproc_per_node, under torchrun, and when one of them dies."""

import os
import signal
import subprocess

import pytest
from conftest import QUIET, CommandLine, read_rows, read_status, stop, wait_for

JOB = ("debug=fast", "trainer.total_steps=3", "trainer.global_batch_size=2", "parallelism.param_dtype=float32", *QUIET)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The job on one rank."""
    cli = CommandLine(tmp_path_factory.mktemp("ranks"))
    done = cli(*JOB, "hydra.run.dir=one")
    assert done.code == 0, done.text
    return cli


def assert_same_run(directory, reference):
    rows, expected = read_rows(directory), read_rows(reference)
    for name in ("train/loss", "train/grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-5)
    for name in ("train/tokens", "train/supervised_tokens", "train/lr", "train/total_tokens"):
        assert [row[name] for row in rows] == [row[name] for row in expected]


def test_two_workers_compute_what_one_does(one):
    done = one(*JOB, "parallelism.nproc_per_node=2", "hydra.run.dir=two")
    assert done.code == 0, done.text
    assert_same_run(one.directory / "two", one.directory / "one")
    assert (
        "Step 3/3" in (one.directory / "two" / "logs" / "rank1.log").read_text()
        or (one.directory / "two" / "logs" / "rank1.log").stat().st_size
    )
    assert done.out.count("Step 3/3") == 1


@pytest.mark.parametrize("extra", [[], pytest.param(["parallelism.dp_replicate=2"], marks=pytest.mark.faults)])
def test_torchrun_makes_one_run_directory(one, extra):
    name = f"torchrun{len(extra)}"
    done = one.torchrun(2, *JOB, *extra, f"hydra.run.dir=outputs/{name}")
    assert done.code == 0, done.text
    assert_same_run(one.directory / "outputs" / name, one.directory / "one")


def test_torchrun_with_one_rank_is_the_published_command(cli):
    done = cli.torchrun(1, "debug=fast", "model=qwen3_tiny", "data=openai_sft", *QUIET)
    assert done.code == 0, done.text
    (status,) = cli.directory.glob("outputs/*/*/status.json")
    assert read_status(status.parent)["state"] == "completed"


def test_a_refusal_under_torchrun_ends_all_ranks(cli):
    done = cli.torchrun(2, "debug=fast", "optimizer.lrr=1", timeout=60)
    assert done.code != 0
    assert done.text.count("Did you mean optimizer.lr?") == 1


def workers(run_dir):
    found = subprocess.run(["pgrep", "-f", f"xtuner_hydra.ranks {run_dir} one"], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found))


def test_a_rank_that_is_killed_takes_the_others_down_and_is_named(cli):
    run = cli.directory / "run"
    process = cli.start_fresh(*JOB, "trainer.total_steps=5000", "parallelism.nproc_per_node=2", "hydra.run.dir=run")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_rows(run)) > 2, process)
    os.kill(workers(run)[1], signal.SIGKILL)
    assert process.wait(60) == 1
    status = read_status(run)
    assert status["state"] == "failed"
    assert "was killed by signal 9" in status["error"]
    assert "was killed by signal 9" in (cli.directory / "output").read_text()
    assert workers(run) == []


def test_ctrl_c_stops_all_ranks(cli):
    run = cli.directory / "run"
    process = cli.start_fresh(*JOB, "trainer.total_steps=5000", "parallelism.nproc_per_node=2", "hydra.run.dir=run")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_rows(run)) > 2, process)
    assert stop(process) == 130
    assert read_status(run)["state"] == "interrupted"
    assert workers(run) == []
