import logging

import pytest

from xtuner_hydra.tracking.console import setup_logging, step_line

ROW = {
    "train/step": 3,
    "train/loss": 10.3,
    "train/lr": 5.9e-5,
    "train/grad_norm": 6.956,
    "train/tokens": 2019,
    "throughput/data_time": 0.00123,
    "throughput/step_time": 1.5,
    "throughput/tgs": 1346.0,
    "throughput/e2e_tgs": 900.04,
    "memory/max_gb": 3.456,
    "memory/reserved_gb": 4.0,
}


@pytest.fixture
def log():
    log = logging.getLogger("xtuner_hydra")
    before = (log.propagate, log.level)
    yield log
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate, log.level = before


def test_a_step_is_told_in_xtuners_keys_and_order():
    assert step_line(ROW, 32) == (
        "Step 3/32 data_time: 0.0012 lr: 0.000059 time: 1.5000 text_tokens: 2019.0 total_loss: 10.300 reduced_llm_loss: 10.300 "
        "max_memory: 3.46 GB reserved_memory: 4.00 GB grad_norm: 6.956 tgs: 1346.0 e2e_tgs: 900.0"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_every_rank_has_a_file_and_the_first_one_the_screen(tmp_path, capsys, log, terminal):
    (tmp_path / "logs").mkdir()
    setup_logging(tmp_path, 1, terminal=terminal)
    log.info("hello")
    log.info("details", extra={"file_only": True})
    written = (tmp_path / "logs" / "rank1.log").read_text()
    assert written.startswith("[xtuner_hydra][RANK 1][20")
    assert written.splitlines()[0].endswith("[INFO] hello")
    assert "details" in written
    screen = capsys.readouterr().out
    assert ("hello" in screen, "details" in screen) == (terminal, False)


def test_a_second_run_in_the_same_process_leaves_the_first_ones_file_alone(tmp_path, log):
    for name in ("one", "two"):
        (tmp_path / name / "logs").mkdir(parents=True)
        setup_logging(tmp_path / name, 0, terminal=False)
        log.info(name)
    assert "two" not in (tmp_path / "one" / "logs" / "rank0.log").read_text()
