import multiprocessing
import os
import signal
import time

import pytest

from xtuner_hydra.data.processes import ProcessDied, map_in_processes
from xtuner_hydra.errors import DataError


def later_first(number):
    time.sleep(0.05 * (3 - number % 4))
    return number, os.getpid()


def test_results_come_in_order_from_several_processes_none_of_which_is_left():
    results = list(map_in_processes(later_first, iter(range(20)), 2))
    assert [number for number, _ in results] == list(range(20))
    assert len({pid for _, pid in results} - {os.getpid()}) == 2
    assert multiprocessing.active_children() == []


def test_no_more_is_begun_than_a_few_ahead():
    begun = []
    items = (begun.append(number) or number for number in range(100))
    results = map_in_processes(abs, items, 2)
    assert next(results) == 0
    time.sleep(0.5)
    assert len(begun) <= 5
    results.close()
    assert list(map_in_processes(abs, iter([]), 2)) == []


def refuse(number):
    raise DataError(f"line {number}: bad")


def test_what_the_function_raises_is_raised():
    with pytest.raises(DataError, match="line 7: bad"):
        list(map_in_processes(refuse, iter([7]), 1))
    assert multiprocessing.active_children() == []


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_that_dies_at_work_is_reported():
    with pytest.raises(ProcessDied, match="died"):
        list(map_in_processes(die, iter(range(9)), 2))
    assert multiprocessing.active_children() == []


def much(item):
    """After the first, only once it is there."""
    number, first_is_there = item
    while number and not first_is_there.exists():
        time.sleep(0.01)
    return number.to_bytes(1) * (32 << 20 if number else 1)


@pytest.mark.timeout(30)
def test_one_that_dies_while_it_sends_its_result_is_reported(tmp_path):
    """More than a pipe holds, so it is still sending when it is killed."""
    results = map_in_processes(much, ((number, tmp_path / "first") for number in range(2)), 2)
    assert next(results) == b"\0"
    (tmp_path / "first").touch()
    time.sleep(0.5)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(ProcessDied, match="died"):
        next(results)


@pytest.mark.timeout(30)
def test_one_that_is_stopped_does_not_outlive_the_end_of_the_others():
    results = map_in_processes(abs, iter(range(100)), 2)
    next(results)
    stopped = multiprocessing.active_children()[0]
    os.kill(stopped.pid, signal.SIGSTOP)
    results.close()  # as after Ctrl-C, or a bad line
    assert multiprocessing.active_children() == []


def test_processes_that_cannot_be_started_are_told(monkeypatch):
    def fail(process):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", fail)
    with pytest.raises(ProcessDied, match=r"cannot be started \(Resource temporarily unavailable\)"):
        list(map_in_processes(abs, iter([1]), 2))
