"""The signals that ask a process to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from xtuner_hydra.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from xtuner_hydra.machine import started_by_torchrun

_IS_NOHUP = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1, *(() if _IS_NOHUP else (signal.SIGHUP,)))
"""What schedulers send, SLURM's warning, and what a terminal sends when it goes, unless `nohup` has it ignored."""
SIGNALS = (*PREEMPTIONS, signal.SIGINT)
"""And Ctrl-C."""


def end_at_once(numbers: Iterable[signal.Signals] = SIGNALS) -> None:
    """Until these signals are handled otherwise, let them end the process with the exit code that they mean for a run, without a traceback:
    nothing has begun yet."""
    for number in numbers:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if not started_by_torchrun():  # of ranks, the launcher says it
        os.write(2, b"xtuner_hydra: stopped by a signal; there was nothing to save\n")
    os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)  # no exception: what is being imported could drop it


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """Handle SIGNALS by `handler` in this block. Outside the main thread, where Python can set no handler, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def die_with_parent() -> None:
    """Linux: have this process terminated when the one that started it dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
