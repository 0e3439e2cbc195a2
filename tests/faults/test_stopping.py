"""Stopping on request: all ranks together, the last finished step saved, and the run that goes on later exact."""

import shutil

import pytest
from conftest import read_rows, read_status
from exactness import assert_same, set_config
from forks import command, prepare, train_on

from xtuner_hydra.checkpoint.commit import damage, numbered, step_of
from xtuner_hydra.run_dir import read_environment

STEPS = 6
JOB = (
    *("debug=fast", "tracking=none", "checkpoint.hf_interval=null", f"trainer.total_steps={STEPS}"),
    *("trainer.global_batch_size=6", "trainer.eval_interval=2", "parallelism.param_dtype=float32"),
)


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def whole(request, tmp_path_factory):
    """(ranks, the run directory before its ranks, the run that nothing stopped); six micro-batches a step, evaluations after 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("stopping")
    run = prepare(directory, *JOB)
    reference = directory / "whole"
    shutil.copytree(run, reference)
    codes, text = train_on(reference, request.param)
    assert codes == [0] * request.param, text
    return request.param, run, reference


def stopped(whole, directory, fault, **environment):
    """Let the last rank get a signal; (exit code of all, the run, what the first rank said)."""
    ranks, prepared, _ = whole
    run = directory / "run"
    shutil.copytree(prepared, run)
    codes, text = train_on(run, ranks, FAULT=fault, FAULT_RANK=str(ranks - 1), **environment)
    assert len(set(codes)) == 1, (codes, text)
    assert "Traceback" not in text
    return codes[0], run, text


@pytest.mark.parametrize(
    ("fault", "where", "saved", "code"),
    [
        pytest.param("SIGTERM@4", {"FAULT_BATCH": "0"}, 3, 75, id="between micro-batches"),
        pytest.param("SIGUSR1@4", {"FAULT_BATCH": "2"}, None, 75, id="at the last micro-batch of two ranks"),
        pytest.param("SIGUSR1@2", {"FAULT_IN": "eval", "FAULT_BATCH": "1"}, 2, 75, id="in an evaluation"),
        pytest.param("SIGINT@3", {}, 2, 130, id="Ctrl-C"),
    ],
)
def test_a_signal_saves_the_last_finished_step_and_the_rest_is_exact(whole, tmp_path, fault, where, saved, code):
    ranks, _, reference = whole
    saved = saved or {1: 3, 2: 4}[ranks]  # a step's last micro-batch is followed by its update
    got, run, text = stopped(whole, tmp_path, fault, **where)
    assert got == code, text
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["step"]) == ("interrupted", code, saved)
    assert [step_of(path) for path in numbered(run / "checkpoints")] == [saved]
    assert damage(run / "checkpoints" / f"step-{saved}", content=True) is None
    assert f"step {saved} is saved first" in text
    set_config(run, "checkpoint.resume", "auto")
    codes, text = train_on(run, ranks)
    assert codes == [0] * ranks, text
    assert_same(run, reference, STEPS)
    assert evaluations(run) == evaluations(reference)


def evaluations(run):
    return [[row["train/step"], row["eval/loss"]] for row in read_rows(run) if "eval/loss" in row]


def test_a_second_ctrl_c_stops_now(whole, tmp_path):
    ranks, *_ = whole
    if ranks > 1:
        pytest.skip("the launcher passes both on; the other ranks of these tests have none")
    code, run, text = stopped(whole, tmp_path, "SIGINT@3", FAULT_TIMES="2")
    assert code == 130, text
    assert read_status(run)["state"] == "interrupted"
    assert "stopped at once" in text
    assert not (run / "checkpoints").exists()


def test_max_seconds_ends_in_time_after_a_save(tmp_path):
    limit = 25
    stopped = command(
        tmp_path, *JOB, "trainer.total_steps=20000", "parallelism.compile=false", f"trainer.max_seconds={limit}", "hydra.run.dir=run"
    )
    assert stopped.wait(90) == 75, stopped.text
    status = read_status(tmp_path / "run")
    assert status["state"] == "interrupted"
    assert status["step"] > 0
    assert status["time"] - read_environment(tmp_path / "run")["started"] < limit
    assert [step_of(path) for path in numbered(tmp_path / "run" / "checkpoints")] == [status["step"]]
    assert "trainer.max_seconds is near" in stopped.text
