"""The run directory: its files, and who may write there. README, "What a run leaves", lists them.

status.json is the state of a run: state (running, completed, failed, interrupted), exit_code, error, step, total_steps, metrics, which process
wrote it, when and where, and for a job that a sweep stopped early why (`pruned`)."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xtuner_hydra.config.schema import Config
from xtuner_hydra.config.strict import from_yaml, to_yaml
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.files import finite, write_json, write_text
from xtuner_hydra.safe_text import redact, redacted

log = logging.getLogger("xtuner_hydra")

QUIET_SECONDS = 15 * 60
"""A run on another host that has written nothing for this long is presumed dead."""
DYING_SECONDS = 20.0
"""How long to wait for processes that still run in a directory: ranks whose launcher was killed save before they end."""


_TREES = ("checkpoints", "hf", "logs")


def refuse_stray(directory: Path, home: Path | None = None, trees: Sequence[str] | None = _TREES) -> None:
    """RefusedError if something in a run directory leads out of it: `metrics.jsonl -> /etc/passwd` must be neither read nor written.

    Looks at the entries of `directory` and at everything below `trees` (None: below any directory in it); we do not read the files of W&B and
    TensorBoard. home: the directory that must not be left, None for `directory`, which may itself be a link then."""
    top = Path(os.path.realpath(home or directory))
    if home is not None:
        _refuse_link_out(directory, top)
    for entry in _entries(directory, trees):
        if entry.is_symlink():
            _refuse_link_out(Path(entry.path), top)
        elif not (entry.is_file() or entry.is_dir()) and os.path.lexists(entry.path):  # a run that is still going renames its files
            raise RefusedError(f"{entry.path}: neither a file nor a directory; a run leaves nothing of that kind")


def _refuse_link_out(path: Path, top: Path) -> None:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(top):
        raise RefusedError(
            f"{path}: a link that leads out of {top} (to {real}), which is not followed; put its target there, or link the whole directory"
        )
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise RefusedError(f"{path}: neither a file nor a directory; a run leaves nothing of that kind")


def _entries(directory: Path, trees: Sequence[str] | None) -> Iterator[os.DirEntry[str]]:
    """The entries of `directory`, and everything below `trees` (None: below every directory in it). An unreadable directory is skipped: whoever
    opens it reports that."""
    try:
        with os.scandir(directory) as found:
            entries = list(found)
    except OSError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False) and (trees is None or entry.name in trees):
            yield from _entries(Path(entry.path), None)


def holds_run(directory: Path) -> bool:
    """True if there is a run: its config or its status exists."""
    # os.path.exists: a directory that may not be entered is an answer (False), not a PermissionError
    return any(os.path.exists(directory / name) for name in ("config.yaml", "status.json"))


def refuse_unusable(directory: Path, *, resuming: bool, key: str = "hydra.run.dir") -> None:
    """RefusedError for a directory that cannot be written, or that holds a run which is not being resumed, or still runs. Creates nothing."""
    if not resuming and holds_run(directory):
        raise RefusedError(
            f"{key}={directory}: holds a run already. Choose another directory, or continue that run with checkpoint.resume=auto"
        )
    if resuming:
        refuse_stray(directory)
        _refuse_running(directory)
    existing = next(parent for parent in (directory, *directory.parents) if os.path.exists(parent))
    if not existing.is_dir():
        raise RefusedError(f"{key}={directory}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RefusedError(f"{key}={directory}: {existing} cannot be written. Choose another directory with {key}=DIR")


def _refuse_running(directory: Path) -> None:
    """RefusedError if another process on this host still trains in `directory`: the two would delete each other's half-written saves.

    One on another host is not waited for: it cannot be queried, and a scheduler that restarts a run elsewhere has ended it there."""
    deadline = time.monotonic() + DYING_SECONDS
    while (process := _running_here(directory)) is not None:
        if time.monotonic() > deadline:
            raise RefusedError(
                f"hydra.run.dir={directory}: this run is still running (process {process['pid']}); end it first, or choose another directory"
            )
        time.sleep(0.2)


def _running_here(directory: Path) -> dict[str, Any] | None:
    """The other process on this host that trains in `directory`, by its status; None if there is none."""
    status = read_status(directory)
    process = status.get("process") or {}
    is_copy = status.get("directory", str(directory.resolve())) != str(directory.resolve())  # of a run that continues in its original place
    if status.get("state") != "running" or process.get("host") != socket.gethostname() or process.get("pid") == os.getpid() or is_copy:
        return None
    return process if is_alive(process, directory) else None


@contextmanager
def alone_in(directory: Path, *, key: str = "hydra.run.dir", patience: float = 0.0) -> Iterator[None]:
    """Make `directory` and lock it for this block. RefusedError where it cannot be made, or another process still has it locked after `patience`
    seconds.

    A file system without locks (some network ones) leaves the check of status.json, or of sweep.json, before it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise RefusedError(f"{key}={directory}: cannot be written ({error.strerror}). Choose another directory") from None
    try:
        if not _locked(handle, time.monotonic() + patience):
            raise RefusedError(f"{key}={directory}: another command is using this directory; end it first, or choose another directory")
        yield
    finally:
        os.close(handle)


def _locked(handle: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        except OSError:  # no locks here
            return True


def create(
    directory: Path, config: Config, overrides: list[str], environment: dict[str, Any], *, step: int = 0, total_steps: int | None = None
) -> None:
    """Make the run directory and write what is known before training, which starts after `step`. A resumed run's files are replaced."""
    with writing(directory):
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        write_config(directory, config)
        write_text(
            directory / "overrides.yaml",
            "".join(f"- {json.dumps(redact(override), ensure_ascii=False)}\n" for override in overrides) or "[]\n",
        )
        write_json(directory / "environment.json", environment)
        write_status(directory, "running", step=step, total_steps=total_steps)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """RefusedError if the block cannot write into a run directory that is being made."""
    try:
        yield
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise RefusedError(f"hydra.run.dir={directory}: cannot be written ({why}). Choose another with hydra.run.dir=DIR") from None


def write_config(directory: Path, config: Config) -> None:
    """Replace config.yaml."""
    write_text(directory / "config.yaml", to_yaml(config))


def read_config(directory: Path) -> Config:
    """The resolved config of a run."""
    return from_yaml((directory / "config.yaml").read_text(encoding="utf-8"))


def read_overrides(directory: Path) -> list[str]:
    """What the user typed to start the run."""
    lines = (directory / "overrides.yaml").read_text(encoding="utf-8").split("\n")  # splitlines splits at more breaks than JSON escapes
    return [json.loads(line[2:]) for line in lines if line.startswith("- ")]


def read_environment(directory: Path) -> dict[str, Any]:
    """environment.json of a run."""
    environment: dict[str, Any] = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    return environment


def note(directory: Path, **entries: Any) -> None:
    """Add to environment.json what only the training process knows."""
    write_json(directory / "environment.json", {**read_environment(directory), **entries})


def write_status(directory: Path, state: str, **fields: Any) -> None:
    """Replace status.json: `state`, `fields` (exit_code, error, step, total_steps, metrics) and what is known of this process."""
    if "metrics" in fields:
        fields["metrics"] = finite(fields["metrics"])
    where = {"time": time.time(), "process": this_process(), "directory": str(directory.resolve())}
    write_json(directory / "status.json", {"state": state, "exit_code": None, "error": None, **redacted(fields), **where})


def record_end(directory: Path, state: str, **fields: Any) -> None:
    """`write_status` of a run that has ended; on a full disk it only logs that: the exit code still says how it ended."""
    try:
        write_status(directory, state, **fields)
    except OSError as error:
        log.error(f"{directory / 'status.json'}: {error.strerror}; it does not say how the run ended")


def read_status(directory: Path) -> dict[str, Any]:
    """status.json, or an empty dict if it is missing or cannot be read."""
    try:
        status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def state(directory: Path) -> str:
    """The state of the run in `directory`: `state_of` its status.json."""
    return state_of(directory, read_status(directory))


def state_of(directory: Path, status: dict[str, Any]) -> str:
    """The state in `status`, but `killed` for a running one whose process is gone, and `pruned` for one that a sweep stopped early."""
    state = str(status.get("state", "unknown"))
    if state == "running" and not is_alive(status.get("process") or {}, directory):
        return "killed"
    return "pruned" if status.get("pruned") else state


def this_process() -> dict[str, Any]:
    """What identifies this process: host, number, and when it started (numbers are reused)."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_alive(process: dict[str, Any], directory: Path) -> bool:
    """Whether the process that wrote `process` into `directory` still runs. On another host, which cannot be queried: whether anything in
    `directory` was written within QUIET_SECONDS."""
    if process.get("host") != socket.gethostname():
        return time.time() - _newest((*directory.glob("*"), *directory.glob("logs/*"))) < QUIET_SECONDS
    started = _started(int(process.get("pid", -1)))
    return started is not None and started == process.get("started", started)


def _newest(paths: Iterable[Path]) -> float:
    """When the last of the files was written; those that have gone meanwhile, such as temporary ones, are left out."""
    newest = 0.0
    for path in paths:
        with suppress(OSError):
            newest = max(newest, path.stat().st_mtime) if path.is_file() else newest
    return newest


def _started(pid: int) -> str | None:
    """When process `pid` started, as the system reports it; None if there is no such process (or only a zombie)."""
    try:
        # the name, in parentheses, may hold spaces and parentheses; after it come proc(5)'s fields from the third on
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between opening and reading
        if Path("/proc/self/stat").exists():
            return None
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)  # no /proc: macOS
    return done.stdout.strip() or None
