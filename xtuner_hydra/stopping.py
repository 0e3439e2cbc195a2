"""Stopping early: signals, the time limit, a save that failed. All ranks agree before any of them stops.

SIGTERM, SIGUSR1 (SLURM's warning) and SIGHUP (a terminal that goes) ask for a save and exit code 75, Ctrl-C for a save and 130; a second
Ctrl-C stops at once. A signal's handler only notes it. The ranks compare notes at the edges of steps, micro-batches and evaluation batches,
over a channel between CPUs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

from xtuner_hydra.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Stopped
from xtuner_hydra.signals import PREEMPTIONS, SIGNALS, handled_by


class Wish(IntEnum):
    """Why to stop; if ranks differ, the greatest counts."""

    NONE = 0
    OUT_OF_TIME = 1
    PREEMPTED = 2
    INTERRUPTED = 3
    SAVE_FAILED = 4


WISHES = {**dict.fromkeys(PREEMPTIONS, Wish.PREEMPTED), signal.SIGINT: Wish.INTERRUPTED}
REASONS = {
    Wish.OUT_OF_TIME: "trainer.max_seconds is near",
    Wish.PREEMPTED: "asked to stop (SIGTERM, SIGUSR1 or SIGHUP)",
    Wish.INTERRUPTED: "interrupted (Ctrl-C)",
    Wish.SAVE_FAILED: "a checkpoint could not be saved",  # its own message says why
}


class Stopping:
    """The requests to stop that this rank knows of.

    at_once: after a second Ctrl-C, not even a save is waited for. edges: how many it has passed. deadline: when the run must have ended, in
    seconds since the epoch, or None. reserve(): seconds that a last save needs."""

    def __init__(self) -> None:
        self.wish = Wish.NONE
        self.at_once = False
        self.training = False
        self.edges = 0
        self.deadline: float | None = None
        self.reserve: Callable[[], float] = lambda: 0.0
        self.save_failed: Callable[[], bool] = lambda: False
        self._longest = 0.0
        self._last = time.monotonic()

    def listening(self) -> AbstractContextManager[None]:
        """Handle the signals during a block."""
        return handled_by(self._note)

    def begin_training(self) -> None:
        """From now on signals wait for the next edge. The time before is not counted as a stretch between edges, as it will not recur."""
        self.training = True
        self._longest, self._last = 0.0, time.monotonic()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let this block finish before a signal is raised as Stopped: the code that it calls would treat that as an error of its own."""
        self.training = True
        yield
        self.training = False
        self.heed()

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Before training, end this block as Stopped if a signal has come and a library has turned the handler's exception into an error of
        its own."""
        try:
            yield
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException:  # DCP's is not an Exception
            if not self.training:
                self.heed()
            raise

    def heed(self) -> None:
        """Raise Stopped if a signal has come: libraries may have dropped the exception that its handler raised."""
        if self.wish != Wish.NONE:
            raise _stopped(self.wish) from None

    def check(self) -> None:
        """At an edge: raise Stopped, on all ranks or on none, if any rank is to stop. Collective."""
        self.edges += 1
        self._longest = max(self._longest, time.monotonic() - self._last)
        wish = torch.tensor(self._own_wish(), dtype=torch.int32)
        if dist.get_world_size() > 1:
            dist.all_reduce(wish, dist.ReduceOp.MAX)
        self._last = time.monotonic()
        agreed = Wish(int(wish))
        if agreed != Wish.NONE:
            raise _stopped(agreed)

    def _own_wish(self) -> Wish:
        if self.save_failed():
            return Wish.SAVE_FAILED
        if self.wish == Wish.NONE and self.deadline is not None and time.time() + self._longest + self.reserve() > self.deadline:
            return Wish.OUT_OF_TIME
        return self.wish

    def _note(self, number: int, frame: FrameType | None) -> None:
        wish, before = WISHES[signal.Signals(number)], self.wish
        self.wish = max(wish, before)
        if before == Wish.INTERRUPTED:  # a second one, or the launcher dying after the first
            self.at_once = True
            raise KeyboardInterrupt
        if not self.training:  # there is nothing to save yet; if Python drops this exception, the first edge finds the wish
            raise _stopped(wish)


def ignore_signals() -> None:
    """The run has ended: what is left to do and report must not be cut short, for example by a launcher that ends the ranks of a failed run."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stopped(wish: Wish) -> Stopped:
    return Stopped(REASONS[wish], EXIT_INTERRUPTED if wish == Wish.INTERRUPTED else EXIT_PREEMPTED)
