"""Ranks of the real launcher that raise, die, hang or meet a NaN: all end, the culprit is named, and the run goes on from its last commit."""

import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import CommandLine, read_rows, read_status
from exactness import assert_same

from xtuner_hydra.checkpoint.commit import numbered, step_of

HERE = Path(__file__).parent
STEPS = 5
JOB = (
    *("debug=fast", f"trainer.total_steps={STEPS}", "trainer.global_batch_size=2", "parallelism.nproc_per_node=2", "tracking=none"),
    *("data.eval_path=null", "checkpoint.interval=1", "checkpoint.keep=9", "checkpoint.hf_interval=null", "hydra.run.dir=run"),
)


@pytest.fixture
def faulty(cli):
    """The command line, whose ranks meet the fault that its environment names."""
    cli.environment["PYTHONPATH"] += f":{HERE / 'on_path'}:{HERE.parent}"
    return cli


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run without a fault."""
    cli = CommandLine(tmp_path_factory.mktemp("reference"))
    done = cli(*JOB)
    assert done.code == 0, done.text
    return cli.directory / "run"


def fails(cli, fault, *overrides, rank=1, **environment):
    """Let a rank meet its fault: how the command ended, and the run."""
    cli.environment |= {"FAULT": fault, "FAULT_RANK": str(rank), **environment}
    done = cli(*JOB, *overrides, timeout=120)
    del cli.environment["FAULT"]
    return done, cli.directory / "run"


def assert_resumes_exactly(cli, run, reference, saved):
    assert [step_of(path) for path in numbered(run / "checkpoints")][-1] == saved
    done = cli(*JOB, "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert f"step {saved}/{STEPS}" in done.out
    assert_same(run, reference, STEPS)


def test_the_rank_that_raises_is_named_with_its_traceback(faulty, reference):
    done, run = fails(faulty, "raise@3")
    assert done.code == 1, done.text
    first = next(line for line in done.err.splitlines() if "failed" in line)
    assert first == "training failed: rank 1: RuntimeError: raised on purpose"
    assert 'raise RuntimeError("raised on purpose")' in done.err
    assert 'raise RuntimeError("raised on purpose")' in (run / "logs" / "rank1.log").read_text()
    assert done.text.count("Traceback (most recent call last)") == 1
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", 1, "rank 1: RuntimeError: raised on purpose")
    assert_resumes_exactly(faulty, run, reference, 2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [pytest.param("raise@3", "raised on purpose", marks=pytest.mark.faults), ("kill@3", "rank 1 was killed by signal 9")],
)
def test_ranks_are_started_again_from_the_last_commit(faulty, reference, tmp_path, fault, words):
    done, run = fails(faulty, fault, "parallelism.max_restarts=1", FAULT_ONCE=str(tmp_path / "struck"))
    assert done.code == 0, done.text
    assert words in done.err
    assert "restarting the ranks from the last checkpoint (restart 1 of 1)" in done.err
    assert f"step 2/{STEPS}" in done.out
    assert read_status(run)["state"] == "completed"
    assert_same(run, reference, STEPS)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["raise@3", "kill@3"])
def test_torchrun_starts_ranks_again(faulty, reference, tmp_path, fault):
    faulty.environment |= {"FAULT": fault, "FAULT_RANK": "0", "FAULT_ONCE": str(tmp_path / "struck")}
    done = faulty.fresh("--nproc-per-node", "2", "--max-restarts", "1", "-m", "xtuner_hydra", *JOB, module="torch.distributed.run")
    assert done.code == 0, done.text
    assert f"step 2/{STEPS}" in done.out
    assert_same(faulty.directory / "run", reference, STEPS)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_rank_that_hangs_is_named_with_its_stack(faulty, reference, rank):
    began = time.monotonic()
    done, run = fails(faulty, "hang@3", "parallelism.timeout=15", rank=rank)
    assert done.code == 1, done.text
    assert time.monotonic() - began < 90
    assert re.search(rf"training failed: rank {rank} hangs.*no progress for 15 s \(parallelism.timeout\)", done.err), done.text
    assert "in _hang" in (run / "logs" / f"rank{rank}.log").read_text()
    assert read_status(run)["state"] == "failed"
    assert_resumes_exactly(faulty, run, reference, 2)


@pytest.mark.faults
def test_a_rank_that_dies_before_all_have_met_does_not_leave_the_others_waiting(faulty, reference):
    began = time.monotonic()
    done, _ = fails(faulty, "kill@0", "checkpoint.asynchronous=true")
    assert done.code == 1, done.text
    assert re.search("(rank 1|one of ranks 0, 1) was killed by signal 9", done.err), done.err
    assert time.monotonic() - began < 90  # the launcher gives those that wait half a minute


@pytest.mark.faults
def test_a_hang_is_tried_again(faulty, reference, tmp_path):
    done, run = fails(faulty, "hang@3", "parallelism.timeout=15", "parallelism.max_restarts=1", FAULT_ONCE=str(tmp_path / "struck"))
    assert done.code == 0, done.text
    assert_same(run, reference, STEPS)


def test_a_nan_stops_before_the_update_and_leaves_a_checkpoint(faulty, reference):
    """The first parameter's gradient on rank 1: every rank stops, nothing is updated, step 2 stands."""
    shutil.rmtree(faulty.directory / "run", ignore_errors=True)
    done, run = fails(faulty, "nan@3", "checkpoint.interval=-1")
    assert done.code == 1, done.text
    assert "step 3: " in done.err
    assert "not finite: the gradients of model.embed_tokens.weight" in done.err
    assert re.search(r"\(samples of the step: \S+openai_sft\.jsonl:\d+", done.err), done.err
    assert "Traceback" not in done.text
    assert [row["train/step"] for row in read_rows(run)] == [1, 2]
    assert_resumes_exactly(faulty, run, reference, 2)


def test_nonfinite_skip_counts_and_gives_up(faulty):
    """Every rank's gradient of one step, then of all of them."""
    done, run = fails(faulty, "nan@3", "optimizer.nonfinite=skip")
    assert done.code == 0, done.text
    rows = read_rows(run)
    assert [row["train/skipped_updates"] for row in rows] == [0, 0, 1, 1, 1]
    assert "step 3: gradient norm nan; update left out (1 so far)" in done.out
    endless = ("optimizer.lr=1e30", "optimizer.nonfinite=skip", "optimizer.max_nonfinite=3", "hydra.run.dir=endless")
    done = faulty(*JOB, *endless, "trainer.total_steps=50")
    assert done.code == 1, done.text
    assert "3 updates in a row had a non-finite loss or gradient" in done.err
    assert "the weights are those of step 1" in done.err
    assert "Traceback" not in done.text
    assert [step_of(path) for path in numbered(faulty.directory / "endless" / "checkpoints")][-1] == 4
