"""What a worker does at a run's end."""

import logging
from pathlib import Path

import pytest
import torch
from runs import evaluation, make_run, step

from xtuner_hydra import worker
from xtuner_hydra.errors import SaveError
from xtuner_hydra.stopping import Stopping, Wish


def test_a_run_ends_with_its_reports(tmp_path):
    make_run(tmp_path, [step(1, 3.0), step(2, 2.0), evaluation(2, 1.5)])
    worker._report(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "Completed after 2 steps" in (tmp_path / "report.html").read_text()


def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(directory):
        raise ValueError("no such font")

    make_run(tmp_path, [step(1, 3.0)])
    monkeypatch.setattr(worker, "loss_png", fail)
    logging.getLogger("xtuner_hydra").propagate = True  # a run in this process would have turned it off
    with caplog.at_level(logging.WARNING, "xtuner_hydra"):
        worker._report(tmp_path)
    assert [record.message for record in caplog.records] == ["fail failed, the run is not affected: ValueError: no such font"]
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("ranks", "at_once", "wish", "error", "interrupted"),
    [
        (1, True, Wish.INTERRUPTED, SaveError(Path("step-3"), None, "KeyboardInterrupt"), True),  # torch made an error of it
        (1, False, Wish.INTERRUPTED, SaveError(Path("step-3"), None, "No space left on device"), False),
        (2, False, Wish.INTERRUPTED, RuntimeError("Connection closed by peer"), True),  # which had stopped at once
        (2, False, Wish.INTERRUPTED, SaveError(Path("step-3"), 1, "No space left on device"), False),
        (1, False, Wish.INTERRUPTED, RuntimeError("a bug"), False),
        (2, False, Wish.NONE, RuntimeError("Connection closed by peer"), False),
    ],
)
def test_a_second_ctrl_c_is_no_failure_whatever_error_it_has_become(monkeypatch, ranks, at_once, wish, error, interrupted):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    stopping = Stopping()
    stopping.at_once, stopping.wish = at_once, wish
    assert worker._was_interrupted(stopping, error) == interrupted


def test_a_rank_whose_error_cannot_be_written_says_it_itself(tmp_path, caplog):
    logging.getLogger("xtuner_hydra").propagate = True
    worker._report_failure(tmp_path / "full", 1, "No space left on device", "", on_screen=False)
    (record,) = caplog.records
    assert record.message == "training failed: No space left on device"
    assert not getattr(record, "file_only", False)


def test_only_layers_that_follow_each_other_are_a_range():
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 5, 1, 2)]
    assert worker._ranges([*names, "lm_head.weight"]) == ["model.layers.[0-2,5].mlp.up_proj.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[x]\nDefaultCPUAllocator: can't allocate memory: 1 bytes")]
)
def test_memory_that_runs_out_is_a_sentence_with_what_takes_less(tmp_path, error):
    (tmp_path / "logs").mkdir()
    told = worker._failed(tmp_path, 0, error, on_screen=True)["error"]
    assert told.startswith("out of memory (")
    assert "data.pack_max_length" in told
    assert worker._failed(tmp_path, 0, RuntimeError("another"), on_screen=True)["error"] == "RuntimeError: another"
