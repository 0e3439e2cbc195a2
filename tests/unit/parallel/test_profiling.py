"""A profile holds the operators of the steps asked for, and nothing is written where none are."""

import json

import torch

from xtuner_hydra.parallel.profiling import FOLDER, WARM_UP, Profiler


def steps(profiler, number):
    for size in range(1, number + 1):
        profiler.begin()
        torch.mm(torch.ones(size, size), torch.ones(size, size))
        profiler.end()


def test_the_steps_after_the_warm_up_are_in_the_trace_and_in_the_table(tmp_path):
    steps(Profiler(tmp_path, 2), 8)
    events = json.loads((tmp_path / FOLDER / "trace.json").read_text())["traceEvents"]
    products = [event["args"]["Input Dims"][0] for event in events if event.get("name") == "aten::mm"]
    assert products == [[WARM_UP + 1] * 2, [WARM_UP + 2] * 2]
    assert "aten::mm" in (tmp_path / FOLDER / "operators.txt").read_text()


def test_no_steps_no_profile(tmp_path):
    steps(Profiler(tmp_path, 0), 4)
    assert not list(tmp_path.iterdir())
