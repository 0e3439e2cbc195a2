"""Errors for the user: each says what is wrong, where, and what to do, and has an exit code (README, "Exit codes"). Also how to exit."""

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class RefusedError(Exception):
    """Something that must be fixed before training can start: config, data or environment. Exit code 2, no traceback."""

    exit_code = EXIT_REFUSED


class ConfigError(RefusedError):
    """A config value that is not allowed. `key` is the full dotted key, `why` a sentence with the remedy."""

    def __init__(self, key: str, value: object, why: str) -> None:
        super().__init__(key, value, why)  # all of them, so that pickle can take it from another process
        self.key = key

    def __str__(self) -> str:
        key, value, why = self.args
        return f"{key}={'null' if value is None else value}: {why}"


class DataError(RefusedError):
    """A data file or a line of it that cannot be used; the message starts with the file (and `line N`)."""


class TrainingError(Exception):
    """Training that cannot continue, with a message that needs no traceback. Exit code 1."""

    exit_code = EXIT_FAILED


class SaveError(TrainingError):
    """A checkpoint or an export that could not be written. The one before it is kept."""

    def __init__(self, directory: Path, rank: int | None, why: str) -> None:
        """`rank`: the one that failed, if there are several."""
        super().__init__(directory, rank, why)

    def __str__(self) -> str:
        directory, rank, why = self.args
        who = f" (rank {rank})" if rank is not None else ""
        return (
            f"{directory} could not be saved{who}: {why}. What was committed before is kept; "
            "fix the cause (disk space, permissions) and continue with checkpoint.resume=auto"
        )


class Stopped(Exception):
    """An early end of a run, on request; training can continue from what was saved."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


def leave(code: int) -> NoReturn:
    """End this process with `code`, after what was registered with atexit. Non-daemon threads are not waited for.

    sys.exit would tear the interpreter down first. If a gloo thread then still releases a tensor, Python ends it in the middle of C++, and
    the whole process with it (SIGABRT, "terminate called without an active exception"): a completed run would end in an error."""
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed from the start
        with suppress(BrokenPipeError):  # a reader that has seen enough (`| head`) is not an error
            stream.flush()
    os._exit(code)
