"""How a machine is shared out among jobs."""

import os
import time

import pytest
from forks import tell_place

from xtuner_hydra.errors import RefusedError
from xtuner_hydra.sweeps import slots
from xtuner_hydra.sweeps.slots import Slots


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """16 cores, 64 GB."""
    monkeypatch.setattr(slots, "cores", lambda: 16)
    monkeypatch.setattr(slots, "available_gb", lambda: 64.0)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def fitted(ranks=1, gpus=0, job_gb=1.0, jobs=100, **options):
    one = Slots(**options)
    one.fit(ranks, gpus, job_gb, jobs)
    return one


@pytest.mark.parametrize(
    ("arguments", "capacity", "threads"),
    [
        ({}, 16, 1),  # cores
        ({"job_gb": 10.0}, 6, 2),  # memory
        ({"job_gb": 100.0}, 1, 16),  # one job in any case
        ({"ranks": 4}, 4, 4 // 4),
        ({"jobs": 3}, 3, 5),
        ({"slots": 1}, 1, 16),
        ({"slots": 2, "threads": 3}, 2, 3),
        ({"gpus": 8}, 8, 2),
        ({"gpus": 8, "ranks": 4}, 2, 2),
        ({"gpus": 8, "devices": [1, 5, 6]}, 3, 5),
    ],
)
def test_slots_and_threads_are_found(arguments, capacity, threads):
    found = fitted(**arguments)
    assert (found.capacity, found.threads_each) == (capacity, threads)


def test_threads_of_the_caller_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert fitted().threads_each == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpus": 2, "ranks": 4}, "has parallelism.nproc_per_node=4"),
        ({"gpus": 2, "slots": 3}, "hold 2 jobs"),
        ({"gpus": 2, "devices": [1, 2]}, "devices: 2 is not a GPU that a job can use; there are 2, counted from 0"),
        ({"devices": [0]}, "there are 0"),
        ({"slots": 0}, "at least 1"),
        ({"threads": "many"}, "whole number"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(RefusedError, match=words):
        fitted(**arguments)


def console(directory, monkeypatch, found):
    """What a job that tells its place wrote, started by `found`; the job."""
    (directory / "logs").mkdir(parents=True)
    monkeypatch.setattr(slots, "start_ranks", tell_place)
    job = found.start(directory)
    end = time.monotonic() + 60
    while not (path := directory / "logs" / "console.log").exists() or not path.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    return path.read_text().split(), job


def test_jobs_see_different_devices_and_a_slot_is_free_again_when_its_job_has_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = fitted(gpus=4, ranks=2)
    first, one = console(tmp_path / "a", monkeypatch, found)
    second, two = console(tmp_path / "b", monkeypatch, found)
    assert first == ["4,5", "4", "4", "2"]
    assert second == ["6,7", "4", "4", "2"]
    assert found.free == []
    assert one.poll() is None
    one.stop()
    end = time.monotonic() + 20
    while one.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert (one.poll(), found.free) == (-15, [0])
    two.kill()
    two.process.join()
    assert two.poll() == -9
    with pytest.raises(ProcessLookupError):
        os.kill(two.process.pid, 0)
