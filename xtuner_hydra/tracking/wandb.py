"""Weights & Biases. Online only with an API key, else offline; the step is `train/step`; finished with the run's exit code.

What a W&B run holds besides the rows of metrics:
    samples   a table of prompts and answers in the history, at each evaluation, if trainer.sample_prompts is set
    config    the resolved config, nested; `overrides` as typed (`overrides.optimizer.lr`), `options` chosen in each group, `run_dir`, `code`
    summary   the last value of every metric; `eval/best_loss` with `eval/best_step`, `throughput/best_tgs`; `state`
    artifacts export and checkpoint of a completed run, if tracking.wandb.artifacts asks for them"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import re
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from xtuner_hydra.config.names import is_plain, split_override
from xtuner_hydra.config.schema import WandbConfig
from xtuner_hydra.errors import ConfigError, RefusedError
from xtuner_hydra.files import write_text
from xtuner_hydra.safe_text import redact, redacted
from xtuner_hydra.tracking import jsonl
from xtuner_hydra.tracking.base import Row, Sample

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

log = logging.getLogger("xtuner_hydra")

ONLINE_SECONDS = 30
"""How long to wait for the server before the run continues offline."""

_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # W&B's service, by its name since wandb 0.31 and by the earlier one
_TAGGED = ("model", "data", "experiment", "debug")  # groups whose options distinguish runs at a glance
_TIME = re.compile(r"\d\d-\d\d-\d\d(-\d+)?_")  # the start of a run directory's name


class WandbTracker:
    """One W&B run under run_dir/wandb. Its id is kept there, so that a resumed run continues the same one.

    A W&B agent names the run and its project in the environment (WANDB_SWEEP_ID, WANDB_RUN_ID), and these are used."""

    required = False

    def __init__(self, config: WandbConfig, run_dir: Path, resolved: dict[str, Any], overrides: list[str], start_step: int = 0) -> None:
        self.config, self.run_dir = config, run_dir
        self.summary = Summary()
        id_file = run_dir / "wandb" / "run_id"
        self.id, known = _run_id(id_file)
        arguments: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "group": None if os.environ.get("WANDB_SWEEP_ID") else config.group,
            "name": config.name or _TIME.sub("", run_dir.name, count=1),
            "tags": _tags(config.tags, run_dir),
            "job_type": "train",
            "config": redacted({**resolved, **_origin(run_dir, overrides)}),
            "dir": str(run_dir),
            "id": self.id,
            "resume": "allow" if known else None,
            "reinit": "finish_previous",
        }
        before = [row for row in jsonl.read(run_dir / "metrics.jsonl") if (row["train/step"] or 0) <= start_step]
        # rows are sent in the background: finding out that the server cannot be reached takes ONLINE_SECONDS
        self._thread, self._waiting = ThreadPoolExecutor(1, "wandb"), deque[Future[None]]()
        self._opened = self._thread.submit(self._open, resolve_mode(config), arguments, before)
        if config.mode == "online":  # a run that requires the server does not start without it
            self._opened.result()

    def _open(self, mode: Literal["online", "offline"], arguments: dict[str, Any], before: list[Row]) -> Run:
        """Start the W&B run. Takes a second or two, during which the first steps are computed."""
        import wandb

        # git, code: W&B would take the diff, the remote's address and the program as they are; environment.json has them redacted
        settings = wandb.Settings(silent=True, console="off", init_timeout=ONLINE_SECONDS, disable_git=True, save_code=False)
        with _redacted_command():
            try:
                run = wandb.init(mode=mode, settings=settings, **arguments)
            except wandb.Error as error:
                if mode != "online" or self.config.mode == "online":
                    raise
                log.warning(
                    f"W&B cannot be reached ({error}); writing an offline run, `xtuner-hydra wandb sync {self.run_dir}` uploads it later"
                )
                wandb.teardown()  # W&B's service still holds the run id of the attempt, and would reject it
                run = wandb.init(mode="offline", settings=settings, **arguments)
        self.known_step = int(run.summary.get("_step") or 0)  # the server's; 0 for a run that is new or offline
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        self._continue_from(run, before)
        log.info(f"W&B: {run.dir if run.offline else run.url}")
        return run

    @property
    def run(self) -> Run:
        """W&B's own object, once it is open. Raises what opening it raised."""
        return self._opened.result()

    def log(self, row: Row) -> None:
        """Send the row in the background. A step and its evaluation are one row of W&B's history, numbered by `train/step`. Raises what an earlier
        row did.

        A resumed run repeats the steps after its checkpoint. W&B accepts no step twice, so those it has already only update the summary."""
        self._later(self._log, row)

    def show(self, samples: list[Sample]) -> None:
        """Log the answers as the table `samples`, in the step's row of the history. Steps that a resumed run repeats have theirs already."""
        self._later(self._show, samples)

    def finish(self, state: str, exit_code: int) -> None:
        """End the W&B run as this one ended; a completed one uploads what was asked for."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
            self.run.summary["state"] = state
            if state == "completed":
                self._upload()
        finally:
            self.run.finish(exit_code=exit_code)

    def _later(self, send: Callable[[Any], None], what: Any) -> None:
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(send, what))

    def _log(self, row: Row) -> None:
        values, step, run = {name: value for name, value in row.items() if value is not None}, int(row["train/step"] or 0), self.run
        if step <= self.known_step:
            run.summary.update(values)
        else:
            run.log(values, step=step)
        if better := self.summary.improve(row):
            run.summary.update(better)

    def _show(self, samples: list[Sample]) -> None:
        import wandb

        step, run = int(samples[0]["train/step"]), self.run
        if step > self.known_step:
            table = wandb.Table(columns=["prompt", "text"], data=[[sample["prompt"], sample["text"]] for sample in samples])
            run.log({"train/step": step, "samples": table}, step=step)

    def _continue_from(self, run: Run, rows: list[Row]) -> None:
        """Continue a resumed run from the summary of its earlier part."""
        last: Row = {}
        for row in rows:
            self.summary.improve(row)
            last |= row
        if last := {name: value for name, value in last.items() if value is not None}:
            run.summary.update({**last, **self.summary.best})

    def _upload(self) -> None:
        """Log export and checkpoint as artifacts. One that cannot be logged causes a warning and does not fail the run."""
        import wandb

        wanted = {"none": (), "all": ("export", "checkpoint")}.get(self.config.artifacts, (self.config.artifacts,))
        if not wanted or not _is_kept(self.run_dir, self.summary):
            return
        for kind in wanted:
            parent = self.run_dir / {"export": "hf", "checkpoint": "checkpoints"}[kind]
            directory = _best_directory(parent, self.summary.best.get("eval/best_step"))
            if directory is None:
                log.warning(f"W&B: there is no {kind} in {parent} to upload (tracking.wandb.artifacts={self.config.artifacts})")
                continue
            try:
                step = int(directory.name.removeprefix("step-"))
                best = step == self.summary.best.get("eval/best_step")
                artifact = wandb.Artifact(f"{kind}-{self.run.id}", type="model", metadata={"step": step, "directory": str(directory)})
                # immutable: what is committed does not change, so W&B need not copy it before it uploads it
                artifact.add_dir(str(directory), policy="immutable", skip_cache=True)
                self.run.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])
            except Exception as error:
                log.warning(f"W&B: the {kind} was not uploaded: {error}")


class Summary:
    """The best values of a run, by W&B's summary key: lowest evaluation loss and its step, highest throughput."""

    def __init__(self) -> None:
        self.best: Row = {}
        self.last: Row = {}

    def improve(self, row: Row) -> Row:
        """Take a row; returns the best values that it changes."""
        self.last |= row
        better: Row = {}
        loss, tgs, best = row.get("eval/loss"), row.get("throughput/tgs"), self.best.get("eval/best_loss")
        if loss is not None and loss < (math.inf if best is None else best):  # a NaN is never below
            better |= {"eval/best_loss": loss, "eval/best_step": row["train/step"]}
        if tgs is not None and tgs > (self.best.get("throughput/best_tgs") or 0):
            better["throughput/best_tgs"] = tgs
        self.best |= better
        return better


def resolve_mode(config: WandbConfig) -> Literal["online", "offline"]:
    """`online` or `offline`. Raises ConfigError for an online run without an API key instead of asking for one."""
    if config.mode == "online" and not has_api_key():
        raise ConfigError("tracking.wandb.mode", "online", "there is no API key; set WANDB_API_KEY, run `wandb login`, or use offline")
    if config.mode == "auto":
        return "online" if has_api_key() and os.environ.get("WANDB_MODE") not in ("offline", "disabled") else "offline"
    return "online" if config.mode == "online" else "offline"


def has_api_key() -> bool:
    """True if W&B would find a key without asking: in the environment, or in netrc for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    own = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(own).hostname or "",) if own else _HOSTS
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
        return any(entries.authenticators(host) is not None for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def nested_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`optimizer.lr=1e-4` -> {"optimizer": {"lr": "1e-4"}}, the shape that W&B filters and groups by (`overrides.optimizer.lr`).

    Values stay as typed. Options (`model=hf`) are left out: they are under `options`, and a key cannot be a text and a dict."""
    nested: dict[str, Any] = {}
    for key, value in map(split_override, overrides):
        *groups, name = key.split(".")
        if groups and "/" not in key:
            inner = nested
            for group in groups:
                if not isinstance(inner.get(group), dict):  # a whole group typed as {...} before one of its keys
                    inner[group] = {}
                inner = inner[group]
            inner[name] = value
    return nested


@contextmanager
def _redacted_command() -> Iterator[None]:
    """W&B stores the command line as it finds it in sys.argv."""
    before = sys.argv
    sys.argv = [redact(word) for word in before]
    try:
        yield
    finally:
        sys.argv = before


def _origin(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """How the run came about, for W&B's config. It is stored beside the config's own groups, none of which has such a name."""
    environment = _environment(run_dir)
    git = environment.get("git") or {}
    return {
        "overrides": nested_overrides(overrides),
        "options": _options(environment),
        "run_dir": str(run_dir),
        "code": {"commit": git.get("commit"), "dirty": git.get("dirty")},
    }


def _tags(own: Sequence[str], run_dir: Path) -> list[str]:
    options = _options(_environment(run_dir))
    tags = [*own, *(options[group] for group in _TAGGED if group in options), *(["sweep"] if _sweep_of(run_dir) else [])]
    return [tag[:64] for tag in dict.fromkeys(tags)]  # W&B accepts no longer ones


def _options(environment: dict[str, Any]) -> dict[str, str]:
    return {group: option for group, option in environment.get("options", {}).items() if option}


def _environment(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _sweep_of(run_dir: Path) -> Path | None:
    """The sweep's directory if this run is a job of one."""
    return run_dir.parent if (run_dir.parent / "sweep.json").exists() else None


def _is_kept(run_dir: Path, summary: Summary) -> bool:
    """Whether a job's files are kept, as its sweep.json says: with `best` those of the best completed job. Those of a standalone run always
    are."""
    directory = _sweep_of(run_dir)
    if directory is None:
        return True
    try:
        plan = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
        keep, metric, sign = plan["keep"], plan["metric"], 1 if plan["direction"] == "minimize" else -1
    except (ValueError, KeyError, TypeError):  # a loss of power leaves such files
        return False
    if keep != "best":
        return bool(keep == "all")
    own = summary.last.get(metric)
    return own is not None and math.isfinite(own) and all(sign * own <= sign * other for other in _others(directory, run_dir, metric))


def _others(sweep_dir: Path, run_dir: Path, metric: str) -> Iterator[float]:
    """The final `metric` of the other completed jobs of a sweep."""
    for path in sweep_dir.glob("*/status.json"):
        try:
            status = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # a loss of power leaves such files
            continue
        value = (status.get("metrics") or {}).get(metric)
        if path.parent != run_dir and status.get("state") == "completed" and value is not None:
            yield value


def _best_directory(parent: Path, best_step: float | int | None) -> Path | None:
    """The committed step-N with the lowest evaluation loss if it still exists, else the newest."""
    steps = {int(path.parent.name.removeprefix("step-")): path.parent for path in parent.glob("step-*/manifest.json")}
    return steps.get(int(best_step)) if best_step in steps else steps[max(steps)] if steps else None


def _is_id(text: str) -> bool:
    """W&B uses it in the name of a directory."""
    return re.fullmatch(r"[\w.-]{1,128}", text) is not None and is_plain(text)


def _run_id(path: Path) -> tuple[str, bool]:
    """(id of the W&B run, whether this run directory has had it before): an agent's, else the one kept in `path`, else a new one, kept there."""
    kept = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    if kept is not None and not _is_id(kept):  # a loss of power leaves such files
        log.warning(f"{path} holds no W&B run id; this run continues under a new one")
        kept = None
    wanted = os.environ.get("WANDB_RUN_ID") or kept or uuid.uuid4().hex[:12]
    if not _is_id(wanted):
        raise RefusedError(f"WANDB_RUN_ID={wanted!r} is not a valid W&B run id")
    if wanted != kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, wanted)
    return wanted, wanted == kept
