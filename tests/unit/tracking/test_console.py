"""What is said on the screen and in the log files."""

import logging
import re
import threading

import pytest

from xtuner_hydra.tracking.console import ConsoleTracker, setup_logging, step_line

XTUNERS_LINE = (  # of the log on its installation page
    "[XTuner][RANK 0][2025-08-28 11:30:16][INFO] Step 1/32 data_time: 0.0039 lr: 0.000060 time: 0.5577 text_tokens: 1125.0 "
    "total_loss: 12.134 reduced_llm_loss: 12.134 max_memory: 4.86 GB reserved_memory: 6.86 GB grad_norm: 16.711 tgs: 2017.2 e2e_tgs: 2003.2"
)
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


def shape(line):
    """A line with every digit turned into 0."""
    return re.sub(r"\d", "0", line)


def test_a_step_of_the_same_numbers_is_xtuners_line_letter_by_letter(tmp_path, capsys, log):
    row = {
        "train/step": 1,
        "train/loss": 12.1341,
        "train/lr": 6e-5,
        "train/grad_norm": 16.7109,
        "train/tokens": 1125,
        "throughput/data_time": 0.00391,
        "throughput/step_time": 0.55770,
        "throughput/tgs": 2017.2153,
        "throughput/e2e_tgs": 2003.2029,
        "memory/max_gb": 4.8601,
        "memory/reserved_gb": 6.8599,
    }
    (tmp_path / "logs").mkdir()
    setup_logging(tmp_path, 0, terminal=True)
    ConsoleTracker(32, 0).log(row)
    line = capsys.readouterr().out.splitlines()[0]
    assert shape(line) == shape(XTUNERS_LINE.replace("XTuner", "xtuner_hydra"))
    assert line.partition(" Step ")[2] == XTUNERS_LINE.partition(" Step ")[2]


def test_the_total_loss_of_experts_has_the_auxiliary_one_in_it():
    line = step_line({**ROW, "train/aux_loss": 4.0}, 32, 0.25)
    assert "total_loss: 11.300 reduced_llm_loss: 10.300 " in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_went_wrong_can_be_told(value):
    assert f"grad_norm: {value} " in step_line({**ROW, "train/loss": value, "train/grad_norm": value}, 32)


def test_an_evaluation_is_told_with_its_step(tmp_path, capsys, log):
    (tmp_path / "logs").mkdir()
    setup_logging(tmp_path, 0, terminal=True)
    ConsoleTracker(32, 0).log({"train/step": 7, "eval/loss": 2.0794, "eval/perplexity": 8.0})
    assert re.search(r"step 7 .*2\.0794.* 8\b", capsys.readouterr().out)


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


def test_a_helper_thread_that_dies_is_a_sentence_on_the_screen_and_a_trace_in_the_file(log, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    (tmp_path / "logs").mkdir()
    setup_logging(tmp_path, 0, terminal=True)
    thread = threading.Thread(target=lambda: 1 / 0, name="writer")
    thread.start()
    thread.join()
    said = capsys.readouterr()
    assert said.out.rstrip().endswith("writer has ended: ZeroDivisionError: division by zero")
    assert "Traceback" not in said.out + said.err
    assert "Traceback" in (tmp_path / "logs" / "rank0.log").read_text()
