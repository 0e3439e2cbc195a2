"""A job's process: forked from one that has imported what all jobs need, which takes longer than a short job's training.

That one, multiprocessing's fork server, does nothing but import: it has no thread whose locks a fork would copy half-way, and touches no GPU
before a job has been given its own. A job is asked to stop when either the server or the sweep is gone, and the server ends after both."""

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
from xtuner_hydra.signals import SIGNALS
from xtuner_hydra.worker import die_with_parent

_context = multiprocessing.get_context("forkserver")
# what a job would import on its way, beside what this file does: torch._dynamo at its first update, matplotlib for its picture
_context.set_forkserver_preload([__name__, "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"])


def begin_imports() -> None:
    """Start the server, whose imports take seconds, without waiting for them."""
    resource_tracker.ensure_running()  # it would be started on the way, and unblock what is blocked
    with _uninterrupted():
        forkserver.ensure_running()


def start(job: Callable[[Path, int], int], directory: Path, ranks: int, variables: dict[str, str]) -> BaseProcess:
    """Call `job(directory, ranks)`, a function of a module, in a process that leads a group of its own and ends with its result as exit code.

    variables: OMP_NUM_THREADS and others, over this process's environment. Output goes to logs/console.log in `directory`."""
    process = _context.Process(target=_be, args=(job, directory, ranks, dict(os.environ) | variables))
    with _uninterrupted():
        process.start()
    return process


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A wish to stop waits: it must not come between a job's start and its being followed, and the server, which inherits this, shall not hear
    it. Ctrl-C, `timeout` and schedulers tell a whole group of processes, and the jobs would go with the server before they could say so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be(job: Callable[[Path, int], int], directory: Path, ranks: int, environment: dict[str, str]) -> None:
    os.setsid()  # Ctrl-C reaches the sweep alone, which then stops its jobs
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    die_with_parent()  # the server, which lives as long as a job does
    threading.Thread(target=_die_with_sweep, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(directory / "logs" / "console.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number in (1, 2):
        os.dup2(output, number)
    # the server's own are missing where the sweep was started without
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
