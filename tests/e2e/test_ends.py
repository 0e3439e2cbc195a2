"""How runs end: Ctrl-C, a NaN, and a loss that should reach zero."""

import signal
from pathlib import Path

import pytest
from conftest import QUIET, read_rows, read_status, stop, wait_for


@pytest.mark.parametrize(
    ("number", "code", "ranks"),
    [
        *((signal.SIGINT, 130, 1), (signal.SIGTERM, 75, 1), (signal.SIGUSR1, 75, 1), (signal.SIGTERM, 75, 2)),
        *(pytest.param(*case, marks=pytest.mark.faults) for case in [(signal.SIGINT, 130, 2), (signal.SIGUSR1, 75, 2)]),
    ],
)
def test_a_signal_saves_and_marks_the_run_interrupted(cli, number, code, ranks):
    """To the command, or with two ranks to the launcher that passes it on."""
    run = cli.directory / "run"
    process = cli.start(
        *("debug=fast", "trainer.total_steps=5000", "tracking=none", "data.eval_path=null", "hydra.run.dir=run"),
        *("trainer.global_batch_size=2", f"parallelism.nproc_per_node={ranks}"),
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_rows(run)) > 2, process)
    assert stop(process, number) == code
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("interrupted", code)
    assert status["step"] > 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{status['step']}"]
    assert "Traceback" not in (cli.directory / "output").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_between_the_run_directory_and_the_first_step_marks_it_too(cli, number, code, ranks):
    run = cli.directory / "run"
    process = cli.start(
        "debug=fast", "tracking=none", "hydra.run.dir=run", "trainer.global_batch_size=2", f"parallelism.nproc_per_node={ranks}"
    )
    wait_for(lambda: (run / "status.json").exists(), process)
    assert stop(process, number) == code
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["step"], status["total_steps"]) == ("interrupted", code, 0, 2)


def test_a_resumed_run_that_is_stopped_at_once_is_where_it_was(cli):
    run, job = cli.directory / "run", ("debug=fast", "tracking=none", "data.eval_path=null", "hydra.run.dir=run")
    done = cli(*job, "trainer.total_steps=2")
    assert done.code == 0, done.text
    process = cli.start(*job, "trainer.total_steps=5000", "checkpoint.resume=auto")
    wait_for(lambda: read_status(run)["state"] == "running", process)
    assert stop(process, signal.SIGTERM) == 75
    status = read_status(run)
    assert (status["state"], status["total_steps"]) == ("interrupted", 5000)
    assert status["step"] >= 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_nan_stops_training_before_the_update_with_the_cause_first(cli, ranks):
    """A rate of 1e30 gives infinite weights after the first step."""
    done = cli(
        *("debug=fast", "trainer.total_steps=5", "optimizer.lr=1e30", "trainer.global_batch_size=2", f"parallelism.nproc_per_node={ranks}"),
        *("hydra.run.dir=run", *QUIET),
    )
    assert done.code == 1, done.text
    assert "optimizer.nonfinite=skip" in done.text
    assert "Traceback" not in done.text
    status = read_status(cli.directory / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "step 2" in status["error"]


def test_sigterm_during_the_imports_ends_with_its_code(cli):
    process = cli.start_fresh("debug=fast", "hydra.run.dir=run", *QUIET)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    assert stop(process, signal.SIGTERM) == 75
    assert "Traceback" not in (cli.directory / "output").read_text()


def test_nonfinite_skip_goes_on_and_counts(cli):
    done = cli("debug=fast", "trainer.total_steps=4", "optimizer.lr=1e30", "optimizer.nonfinite=skip", "hydra.run.dir=run", *QUIET)
    assert done.code == 0, done.text
    assert read_rows(cli.directory / "run")[-1]["train/skipped_updates"] == 3
    assert "update left out" in done.out


def test_a_warm_up_that_is_longer_than_the_run_and_a_decay_that_is_too_short_are_announced(cli):
    done = cli("debug=fast", "scheduler=wsd", "scheduler.warmup_steps=9", "hydra.run.dir=run", *QUIET)
    assert done.code == 0, done.text
    assert "scheduler.warmup_steps=9: cut to the run's 2 steps" in done.out
    assert "scheduler.decay_ratio=0.2: 0 of 2 steps, too few for the rate to fall" in done.out
    rates = [row["train/lr"] for row in read_rows(cli.directory / "run")]
    assert rates[0] == pytest.approx(rates[1] / 2)


def test_overfit_learns_its_pack(cli):
    """One instead of the few that it sees by itself, which needs a third of the steps."""
    done = cli("debug=overfit", "data.sample_ratio=0.015", "trainer.total_steps=100", "tracking=none", "hydra.run.dir=run", timeout=280)
    assert done.code == 0, done.text
    losses = [row["train/loss"] for row in read_rows(cli.directory / "run")]
    assert losses[0] > 4
    assert losses[-1] < 0.1
