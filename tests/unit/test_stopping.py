"""Wishes to stop: noted by one rank, agreed by all at an edge, each with its exit code."""

import os
import signal
import time
from contextlib import suppress

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.checkpoint import CheckpointException

from xtuner_hydra.errors import Stopped
from xtuner_hydra.signals import SIGNALS
from xtuner_hydra.stopping import Stopping, Wish, ignore_signals

EDGE = 3

HANGUP = pytest.param(
    signal.SIGHUP, 75, marks=pytest.mark.skipif(signal.SIGHUP not in SIGNALS, reason="started under nohup, which has it ignored")
)


def stop_on_a_rank(wishes):
    """For each case of `wishes` (rank -> signal) train until it stops; (edge, exit code) of each."""
    dist.init_process_group("gloo")
    told = [edges_until_stopped(case.get(dist.get_rank())) for case in wishes]
    dist.destroy_process_group()
    return told


def edges_until_stopped(number):
    stopping = Stopping()
    with stopping.listening():
        stopping.training = True
        for edge in range(20):
            if edge == EDGE and number is not None:
                os.kill(os.getpid(), number)
            try:
                stopping.check()
            except Stopped as stop:
                return edge, stop.exit_code
    return None


def test_all_ranks_stop_at_the_edge_at_which_one_was_asked_to():
    cases = [
        ({1: signal.SIGUSR1}, 75),
        ({0: signal.SIGTERM}, 75),
        ({1: signal.SIGINT}, 130),
        ({0: signal.SIGTERM, 1: signal.SIGINT}, 130),
    ]
    told = run_on_ranks(stop_on_a_rank, 2, [case for case, _ in cases])
    assert told == [[(EDGE, code) for _, code in cases]] * 2


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def stopping():
    """One that listens and trains; the process's own handlers come back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    one = Stopping()
    with one.listening():
        one.training = True
        yield one
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_who_wishes_nothing_stops(stopping):
    for _ in range(3):
        stopping.check()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), HANGUP, (signal.SIGINT, 130)])
def test_during_training_a_signal_waits_for_the_edge(stopping, number, code):
    os.kill(os.getpid(), number)
    assert stopping.wish != Wish.NONE
    with pytest.raises(Stopped) as stop:
        stopping.check()
    assert stop.value.exit_code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), HANGUP, (signal.SIGINT, 130)])
def test_before_training_a_signal_stops_at_once(stopping, number, code):
    stopping.training = False
    with pytest.raises(Stopped) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == code


def test_a_signal_waits_for_the_end_of_what_must_not_be_cut_short(stopping):
    stopping.training = False

    def asked_to_stop_in_the_middle():
        with stopping.holding():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("the rest")

    done = []
    with pytest.raises(Stopped, match="SIGTERM"):
        asked_to_stop_in_the_middle()
    assert done == ["the rest"]


def test_a_signal_whose_exception_was_dropped_is_heeded(stopping):
    stopping.training = False
    stopping.heed()
    with suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        stopping.heed()


def signalled(stopping, error):
    """A signal, and what a library makes of the exception that its handler raises."""
    with stopping.heeding():
        with suppress(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        raise error


@pytest.mark.parametrize("error", [TypeError("__init__() missing 1 argument"), CheckpointException("load", {})])
def test_what_a_library_makes_of_a_signal_before_training_is_still_a_stop(stopping, error):
    stopping.training = False
    with pytest.raises(Stopped) as caught:
        signalled(stopping, error)
    assert caught.value.exit_code == 75


def test_an_error_of_training_is_not_taken_for_the_signal_that_came_before_it(stopping):
    with pytest.raises(TypeError):
        signalled(stopping, TypeError("a bug"))


def test_an_error_without_a_signal_stays_one(stopping):
    stopping.training = False
    with pytest.raises(TypeError), stopping.heeding():
        raise TypeError("a bug")


def test_a_second_ctrl_c_does_not_wait(stopping):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_scheduler_that_asks_twice_does_not_cut_the_save_short(stopping):
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
    with pytest.raises(Stopped, match="SIGTERM, SIGUSR1 or SIGHUP"):
        stopping.check()


def test_afterwards_the_handlers_of_before_come_back():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with Stopping().listening():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_once_a_run_has_ended_signals_are_ignored(stopping):
    ignore_signals()
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    assert stopping.wish == Wish.NONE


def test_time_is_up_when_the_last_save_would_not_fit_any_more(stopping):
    stopping.deadline = time.time() + 1000
    stopping.check()
    stopping.reserve = lambda: 900.0
    stopping.check()
    stopping.reserve = lambda: 1100.0
    with pytest.raises(Stopped, match="max_seconds") as stop:
        stopping.check()
    assert stop.value.exit_code == 75


def test_time_is_up_when_another_step_would_not_fit_any_more(stopping):
    stopping.deadline = time.time() + 1000
    stopping.check()
    time.sleep(0.3)
    stopping.check()  # that was the longest way between two edges
    stopping.deadline = time.time() + 0.25
    with pytest.raises(Stopped, match="max_seconds"):
        stopping.check()


def test_the_start_is_no_step_for_which_time_must_be_left(stopping):
    time.sleep(0.3)
    stopping.begin_training()
    stopping.deadline = time.time() + 0.25
    stopping.check()


def test_a_signal_is_named_rather_than_the_time(stopping):
    stopping.deadline = time.time() - 1
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped) as stop:
        stopping.check()
    assert stop.value.exit_code == 130


def test_a_save_that_failed_wins(stopping):
    stopping.deadline = time.time() - 1
    os.kill(os.getpid(), signal.SIGINT)
    stopping.save_failed = lambda: True
    with pytest.raises(Stopped, match="could not be saved"):
        stopping.check()
