"""A prepared run directory -> its ranks: one inside this process, several as workers under torch's elastic launcher.

    python -m xtuner_hydra.ranks RUN_DIR RANKS              (how submitit starts a job of a sweep)
    python -m xtuner_hydra.ranks RUN_DIR one [restarted]    (how the launcher starts a rank, with its number in the environment)

Workers that crash are restarted from the last commit, up to parallelism.max_restarts times. What would fail the same way again (bad data,
a NaN, a full disk) is not retried, a distinction that torch's own restarts cannot make.

Never sees Hydra: all it needs is in the run directory."""

from __future__ import annotations

import json
import logging
import signal
import sys
import uuid
from pathlib import Path

from xtuner_hydra import run_dir as run_dirs
from xtuner_hydra.config.schema import Config
from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_REFUSED, leave
from xtuner_hydra.garbage import collect_seldom
from xtuner_hydra.results.glance import progress
from xtuner_hydra.safe_text import printable, redact
from xtuner_hydra.signals import PREEMPTIONS, SIGNALS, die_with_parent, end_at_once
from xtuner_hydra.streams import make_lasting


def main() -> int:
    """Entry point of a job's or a rank's process: ends when the process that started it does."""
    make_lasting()
    end_at_once()  # until the rank listens, once torch and the rest have been imported
    collect_seldom()
    from xtuner_hydra.worker import train

    die_with_parent()
    directory, ranks, *again = sys.argv[1:]
    if ranks == _ONE:
        return train(Path(directory), traceback_on_screen=False, restarted=bool(again))
    return start_ranks(Path(directory), int(ranks))


_ONE = "one"
SHUTDOWN_SECONDS = 600
"""Time that workers get to save and end after a signal; a less patient scheduler kills them itself."""


def start_ranks(directory: Path, ranks: int) -> int:
    """Train the run of `directory` on `ranks` ranks to its end; returns the exit code."""
    restarts = _resolved(directory).parallelism.max_restarts
    if ranks == 1 and restarts == 0:
        return train_here(directory)
    for left in range(restarts, -1, -1):
        code, is_crash = _start_workers(directory, ranks, restarted=left < restarts)
        if not is_crash or not left:
            return code
        print(f"restarting the ranks from the last checkpoint (restart {restarts - left + 1} of {restarts})", file=sys.stderr)
    raise AssertionError


def train_here(directory: Path, *, restarted: bool = False) -> int:
    """Be one rank, the only one or one of a launcher's, in this process."""
    from xtuner_hydra.worker import train

    return train(directory, restarted=restarted)


def _resolved(directory: Path) -> Config:
    """The run's config; `param_dtype=auto` of a job that was prepared on another machine becomes what it means on this one."""
    config = run_dirs.read_config(directory)
    if config.parallelism.param_dtype == "auto":
        from xtuner_hydra.parallel.runtime import param_dtype

        config.parallelism.param_dtype = param_dtype("auto", config.trainer.device)
        run_dirs.write_config(directory, config)
    return config


def _start_workers(directory: Path, ranks: int, *, restarted: bool) -> tuple[int, bool]:
    """Run `ranks` workers to their end; (exit code, whether they crashed), with the first failing rank's error on screen and in status.json."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle=",".join(number.name for number in (*SIGNALS, signal.SIGQUIT)),
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # repeats, at length, what `_explain` says
    for stale in [*(directory / "logs").glob("*.error.json"), *(directory / "logs").glob("*.stuck.json")]:
        stale.unlink()
    try:
        elastic_launch(config, sys.executable)("-m", "xtuner_hydra.ranks", str(directory), _ONE, *(["restarted"] if restarted else []))
    except ChildFailedError as error:
        return _explain(directory, {rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stop:
        return _stopped(directory, stop.sigval), False
    except KeyboardInterrupt:
        return _stopped(directory, signal.SIGINT), False
    return EXIT_DONE, False


def _stopped(directory: Path, number: signal.Signals) -> int:
    """The exit code after a signal: that of the ranks, or the signal's own if they ended without recording one, as when they had hardly
    started."""
    status = run_dirs.read_status(directory)
    if status.get("state") == "running":
        code = EXIT_PREEMPTED if number in PREEMPTIONS else EXIT_INTERRUPTED
        error = f"stopped at once by {signal.Signals(number).name}; no save was made"
        run_dirs.record_end(directory, "interrupted", exit_code=code, error=error, **progress(directory))
        print(f"{error}: {directory}", file=sys.stderr)
        return code
    return int(status.get("exit_code", EXIT_INTERRUPTED))


def _explain(directory: Path, codes: dict[int, int]) -> tuple[int, bool]:
    """(exit code, whether it was a crash), and the first cause among the ranks that failed with `codes` on screen: one that was killed, else the
    one that failed first."""
    causes = [json.loads(path.read_text(encoding="utf-8")) for path in (directory / "logs").glob("*.error.json")]
    # the launcher ends the others with SIGTERM (-15), or SIGKILL after a grace period; only a rank that never wrote its error was hit itself
    told = {cause["rank"] for cause in causes}
    struck = {rank: code for rank, code in codes.items() if code < 0 and code != -15 and rank not in told}
    stops = {*codes.values()} & {EXIT_INTERRUPTED, EXIT_PREEMPTED}
    # agreed by all; the launcher's SIGTERM after another rank's crash is not a request to stop
    if stops == {*codes.values()} and not struck and not causes:
        return max(stops), False
    if struck:
        rank, code = min(struck.items())
        # the launcher kills those that do not end after the first
        who = f"rank {rank}" if len(struck) == 1 else f"one of ranks {', '.join(map(str, sorted(struck)))}"
        text, details = f"{who} was killed by signal {-code}{' (out of memory?)' if code == -9 else ''}", ""
    elif causes:
        first = min(causes, key=lambda cause: cause["time"])
        rank, text, details = first["rank"], first["error"], first["traceback"]
    else:
        rank, code = min(codes.items())
        text, details = f"rank {rank} exited with code {code}", ""
    text = f"rank {rank}: {text}" if details and not text.startswith("rank ") else text  # a message without a traceback is complete
    code = EXIT_REFUSED if codes.get(rank) == EXIT_REFUSED else EXIT_FAILED
    is_crash = bool(struck or details or not causes)  # an expected error has no traceback
    run_dirs.record_end(directory, "failed", exit_code=code, error=text, **progress(directory))
    print(printable(redact(f"training failed: {text}\n{details}(log: {directory / 'logs' / f'rank{rank}.log'})")), file=sys.stderr)
    return code, is_crash


if __name__ == "__main__":
    leave(main())
