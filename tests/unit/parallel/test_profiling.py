"""A profile holds the operators of the steps asked for, and nothing is written where none are."""

import json
from pathlib import Path

import pytest
import torch

from xtuner_hydra.parallel.profiling import FOLDER, WARM_UP, Profiler


def steps(profiler, number):
    for size in range(1, number + 1):
        profiler.begin()
        torch.mm(torch.ones(size, size), torch.ones(size, size))
        profiler.end()
    profiler.close()


def test_the_steps_after_the_warm_up_are_in_the_trace_and_in_the_table(tmp_path):
    steps(Profiler(tmp_path, 2), 8)
    events = json.loads((tmp_path / FOLDER / "trace.json").read_text())["traceEvents"]
    products = [event["args"]["Input Dims"][0] for event in events if event.get("name") == "aten::mm"]
    assert products == [[WARM_UP + 1] * 2, [WARM_UP + 2] * 2]
    assert "aten::mm" in (tmp_path / FOLDER / "operators.txt").read_text()


@pytest.mark.parametrize("broken_off", [False, True])
def test_a_run_that_ends_sooner_leaves_what_was_seen(tmp_path, caplog, broken_off):
    profiler = Profiler(tmp_path, 5)
    if broken_off:  # within the second of the profiled steps
        for _ in range(WARM_UP + 1):
            profiler.begin()
            profiler.end()
        profiler.begin()
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        profiler.close()
    else:
        steps(profiler, WARM_UP + 1)
    assert "aten::mm" in (tmp_path / FOLDER / "operators.txt").read_text()
    assert "the run ended 4 steps too early" in caplog.text


def test_a_run_without_a_step_after_the_warm_up_says_so(tmp_path, caplog):
    steps(Profiler(tmp_path, 2), WARM_UP)
    assert not list(tmp_path.iterdir())
    assert "no profile: the run ended within the first 2 steps" in caplog.text


def test_a_trace_that_could_not_be_written_is_told(tmp_path, caplog, monkeypatch):
    """kineto says so on stderr, and leaves what fitted."""
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: Path(f"{path}.tmp").write_text("{"))
    steps(Profiler(tmp_path, 2), 8)
    assert "trace.json could not be written" in caplog.text
    assert "profile written" not in caplog.text
    assert not list((tmp_path / FOLDER).iterdir())


def test_no_steps_no_profile(tmp_path, caplog):
    steps(Profiler(tmp_path, 0), 4)
    assert not caplog.text
    assert not list(tmp_path.iterdir())
