"""The command line: `python -m xtuner_hydra [VERB] ...`, also installed as `xtuner-hydra`. Without a verb: train.

Every way out is here: an error that a person can mend is one message and exit code 2, never a traceback."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import NoReturn

from xtuner_hydra import __version__
from xtuner_hydra.errors import EXIT_DONE, EXIT_INTERRUPTED, RefusedError, Stopped, TrainingError, leave
from xtuner_hydra.garbage import collect_seldom
from xtuner_hydra.machine import own_rank, started_by_torchrun
from xtuner_hydra.safe_text import LineFormatter, printable, redact
from xtuner_hydra.signals import PREEMPTIONS, end_at_once
from xtuner_hydra.streams import make_lasting, open_closed


def command() -> NoReturn:
    """This process's command line, under a better malloc where there is one, to the end of the process."""
    from xtuner_hydra.parallel.allocator import preload

    open_closed()
    preload()
    make_lasting()
    end_at_once(PREEMPTIONS)  # until a run or a sweep handles them; Ctrl-C is a KeyboardInterrupt
    collect_seldom()
    _log_to_stderr()
    leave(main(sys.argv[1:]))


def _log_to_stderr() -> None:
    """Warnings before a run sets up its log: without secrets and control characters, as everything that is printed."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.getLogger("xtuner_hydra").addHandler(handler)


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv`; returns the exit code."""
    argv = list(argv)
    try:
        return _verb(argv)(argv)
    except (RefusedError, TrainingError) as error:
        print(f"xtuner_hydra: {printable(redact(str(error)))}", file=sys.stderr)
        code = error.exit_code
    except Stopped as stop:
        print(f"xtuner_hydra: {stop}", file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        print("xtuner_hydra: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # a reader that has seen enough (`| head`) is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    if started_by_torchrun() and own_rank() == 0:
        from xtuner_hydra.launch import publish

        publish({"exit_code": code})  # or the other ranks would wait
    return code


def train(argv: list[str]) -> int:
    """Compose, check, train: one run, or with -m a sweep."""
    if own_rank() > 0:
        from xtuner_hydra.launch import follow

        return follow()
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        from xtuner_hydra.launch import continue_after_crash

        if (code := continue_after_crash()) is not None:
            return code
    from xtuner_hydra.app import App

    with App(argv) as app:
        if app.shows_something():
            return _shown()
        if app.is_sweep:
            app.sweep_config()  # refuses what can be refused before torch is imported
            from xtuner_hydra.sweeps.multirun import sweep

            return sweep(app)
        composition = app.compose_run()
    from xtuner_hydra.launch import run

    return run(composition)


VERBS = ("plan", "data", "doctor", "report", "runs", "diff", "rerun", "chat", "evaluate", "export", "checkpoint", "wandb")
"""The words that a command line can begin with; each is a module of xtuner_hydra.tools with a `main(arguments)`."""


_NO_VERBS = {
    "train": "training needs none: xtuner-hydra [GROUP=OPTION] [KEY=VALUE]",
    "sweep": "a sweep is several values: xtuner-hydra -m KEY=A,B",
    "help": "see --help",
}


def _verb(argv: list[str]) -> Callable[[list[str]], int]:
    """The function for the first word; a word that is neither verb, option nor override is refused by name."""
    if argv == ["--version"]:  # Hydra's would tell its own
        return _version
    if not argv or argv[0].startswith("-") or "=" in argv[0] or argv[0].startswith(("+", "~")):
        if late := _late_verb(argv):
            raise RefusedError(f"{late}: a command comes first: xtuner-hydra {late} ...")
        return train
    if argv[0] in VERBS:
        return lambda words: import_module(f"xtuner_hydra.tools.{words[0]}").main(words[1:])
    if argv[0] in _NO_VERBS:
        raise RefusedError(f"{argv[0]}: no such command; {_NO_VERBS[argv[0]]}")
    from xtuner_hydra.config.strict import did_you_mean

    hint = did_you_mean(argv[0], list(VERBS))
    raise RefusedError(f"{argv[0]}: no such command (there are {', '.join(VERBS)}), nor an override (KEY=VALUE).{hint} See --help")


def _version(argv: list[str]) -> int:
    print(f"xtuner_hydra {__version__}")
    return EXIT_DONE


def _late_verb(argv: list[str]) -> str | None:
    """A verb that is neither the first word nor the value of an option."""
    switches = ("-m", "--multirun", "--trust")
    return next((word for before, word in pairwise(argv) if word in VERBS and (before in switches or not before.startswith("-"))), None)


def _shown() -> int:
    if started_by_torchrun():
        from xtuner_hydra.launch import publish

        publish({"exit_code": EXIT_DONE})
    return EXIT_DONE


if __name__ == "__main__":
    command()
