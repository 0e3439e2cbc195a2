"""A job's process: forked from one that has imported what all jobs need, as importing takes longer than a short job's training.

The parent, multiprocessing's fork server, does nothing but import: it has no threads whose locks a fork might copy while held, and touches no
GPU before a job has been given its own. A job is asked to stop when either the server or the sweep is gone; the server ends after both."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from xtuner_hydra.errors import leave
from xtuner_hydra.signals import SIGNALS, die_with_parent

_context = multiprocessing.get_context("forkserver")
# what a job would import later, besides this file's imports: torch._dynamo at its first update, matplotlib for its picture
_context.set_forkserver_preload([__name__, "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"])


def begin_imports() -> None:
    """Start the server, whose imports take seconds, without waiting for them."""
    resource_tracker.ensure_running()  # otherwise it would be started later, and unblock blocked signals
    with _uninterrupted():
        forkserver.ensure_running()


def start(job: Callable[[Path, int], int], directory: Path, ranks: int, variables: dict[str, str]) -> BaseProcess:
    """Call `job(directory, ranks)`, a module-level function, in a process that leads its own group and exits with its result.

    variables: OMP_NUM_THREADS and others, over this process's environment. Output goes to logs/console.log in `directory`."""
    process = _context.Process(target=_be, args=(job, directory, ranks, dict(os.environ) | variables))
    with _uninterrupted():
        process.start()
    return process


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay stop signals: none may arrive between a job's start and its being followed, and the server, which inherits the mask, must not get
    any. Ctrl-C, `timeout` and schedulers signal a whole process group, and the jobs would end with the server before they could report."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be(job: Callable[[Path, int], int], directory: Path, ranks: int, environment: dict[str, str]) -> None:
    os.setsid()  # Ctrl-C reaches only the sweep, which then stops its jobs
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    die_with_parent()  # the server, which lives as long as a job does
    threading.Thread(target=_die_with_sweep, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(directory / "logs" / "console.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number in (1, 2):
        os.dup2(output, number)
    # the server's own are missing if the sweep was started without them
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False, errors="backslashreplace") for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # OpenMP has read the server's
    leave(job(directory, ranks))


def _die_with_sweep() -> None:
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os.kill(os.getpid(), signal.SIGTERM)
