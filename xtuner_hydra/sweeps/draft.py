"""A sweep before it starts: every job composed and checked with its data, so that none is rejected later; `plan -m` prints it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xtuner_hydra import launch
from xtuner_hydra.app import App
from xtuner_hydra.checkpoint.commit import numbered
from xtuner_hydra.config.composition import Composition
from xtuner_hydra.config.names import split_override
from xtuner_hydra.config.schema import Config, DataConfig, SweepConfig
from xtuner_hydra.config.strict import changed, did_you_mean
from xtuner_hydra.cost import disk_bytes, memory_gb
from xtuner_hydra.errors import ConfigError, RefusedError
from xtuner_hydra.results.sweep import Job
from xtuner_hydra.sweeps import search, space, submitit
from xtuner_hydra.sweeps.space import Parameter
from xtuner_hydra.tracking.base import METRICS, MORE_IS_BETTER


@dataclass(frozen=True)
class JobDraft:
    """A job that passed all checks. disk: bytes that it leaves if its checkpoints are kept. tokens: how many it trains on."""

    job: Job
    config: Config
    ranks: int
    steps: int
    tokens: int
    disk: int
    memory_gb: float
    data: str
    """Fingerprint of the data that it trains and is judged on."""
    twin: int | None = None
    """Number of an earlier job with the same signature."""


@dataclass(frozen=True)
class Draft:
    """A sweep that can start. jobs: all of a list (twins too), or the corners of a search space."""

    directory: Path
    fixed: list[str]
    parameters: list[Parameter]
    sweep: SweepConfig
    metric: str
    jobs: list[JobDraft]

    @property
    def is_list(self) -> bool:
        return self.sweep.search in ("grid", "zip")

    @property
    def swept(self) -> list[str]:
        """The keys that vary."""
        return list(dict.fromkeys(split_override(text)[0] for draft in self.jobs for text in draft.job.overrides))

    @property
    def listed(self) -> list[Job]:
        """The jobs to run: each signature once."""
        return [draft.job for draft in self.jobs if draft.twin is None] if self.is_list else []

    @property
    def total(self) -> int:
        return len(self.listed) if self.is_list else self.sweep.trials


def draft(app: App, directory: Path) -> Draft:
    """Expand and check the sweep of `app`'s command line in `directory`. Raises RefusedError for the first invalid job, with its overrides."""
    sweep = app.sweep_config()
    _refuse_missing(app, sweep)
    fixed, parameters = space.split(app, sweep)
    if not parameters:
        raise RefusedError("-m: nothing to sweep; give a key several values (optimizer.lr=1e-5,6e-5), or choose a preset (sweep=seeds)")
    swept = space.jobs(parameters, sweep.search) if sweep.search in ("grid", "zip") else space.corners(parameters)
    return replace(draft_list(app, sweep, fixed, swept, directory), parameters=parameters)


def draft_list(app: App, sweep: SweepConfig, fixed: list[str], swept: Sequence[list[str]], directory: Path, *, first: int = 0) -> Draft:
    """Check jobs, numbered from `first`, given by their swept overrides."""
    jobs: list[JobDraft] = []
    for number, overrides in enumerate(swept):
        try:
            jobs.append(_check(app, fixed, overrides, first + number, directory, jobs))
        except RefusedError as error:
            raise RefusedError(f"job {number + 1} of {len(swept)} ({' '.join(overrides)}): {error}") from None
    return Draft(directory, fixed, [], sweep, _metric(sweep, jobs), jobs)


def compose(app: App, fixed: list[str], overrides: list[str], number: int, directory: Path) -> Composition:
    """A job from its overrides; its W&B runs are grouped by the sweep."""
    composition = app.compose_job(fixed, overrides, number, directory)
    if composition.config.tracking.wandb.group is None:
        composition.config.tracking.wandb.group = directory.name
    return composition


def continued(composition: Composition) -> Composition:
    """A job as it will run: one that already has checkpoints in its directory continues from there, even if it started from another run's."""
    checkpoint = composition.config.checkpoint
    if checkpoint.resume == "never" or numbered(composition.run_dir / "checkpoints"):
        checkpoint.resume = "auto"
    return composition


def signature(config: Config, default: Config) -> str:
    """What a job is: a hash of its values that differ from the defaults, so that a key added later does not change it."""
    values = {key: value for key, (_, value) in changed(config, default).items() if not _is_aside(key, value)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _refuse_missing(app: App, sweep: SweepConfig) -> None:
    """RefusedError if an optional package that the sweep needs is not installed."""
    if sweep.search in ("random", "bayes"):
        search.refuse_missing()
    if cluster := app.launcher()[1].get("cluster"):
        submitit.refuse_missing(cluster)


def _check(app: App, fixed: list[str], overrides: list[str], number: int, directory: Path, earlier: Sequence[JobDraft]) -> JobDraft:
    composition = compose(app, fixed, overrides, number, directory)
    if not composition.config.tracking.jsonl:
        raise ConfigError("tracking.jsonl", "false", "a sweep follows and compares its jobs by metrics.jsonl; leave it true")
    sign, name = signature(composition.config, app.defaults), composition.run_dir.name
    if same := [one.job.number for one in earlier if one.job.name == name and one.job.signature != sign]:
        raise RefusedError(f"hydra.sweep.subdir: {name} is also the directory of job {same[0]}; include ${{hydra.job.num}} in it")
    prepared = launch.prepare(continued(composition), elsewhere=app.launches_elsewhere)
    config, plan, sizes = prepared.config, prepared.data.plan, prepared.sizes
    return JobDraft(
        Job(number, name, overrides, sign),
        config,
        prepared.ranks,
        plan.total_steps,
        plan.total_tokens,
        disk_bytes(config, sizes, plan.total_steps),
        memory_gb(sizes),
        "-".join(source.cache.fingerprint[:16] for source in (prepared.data.train, prepared.data.eval) if source),
        twin=next((one.job.number for one in earlier if one.job.signature == sign), None),
    )


def _is_aside(key: str, value: object) -> bool:
    """Settings that do not make it a different job. Starting from another run's checkpoint does."""
    if key == "checkpoint.resume":
        return value in ("auto", "never")
    return key.startswith(("sweep.", "tracking.")) or key in ("data.num_workers", "data.cache_dir")


def _has_held_out(data: DataConfig) -> bool:
    return data.eval_path is not None or data.eval_ratio is not None


def _metric(sweep: SweepConfig, jobs: Sequence[JobDraft]) -> str:
    """The metric that ranks the jobs. Raises ConfigError for one that does not exist or that a job would not have."""
    evaluated = all(_has_held_out(draft.config.data) and draft.config.trainer.eval_interval is not None for draft in jobs)
    metric = sweep.metric or ("eval/loss" if evaluated else "train/loss")
    if metric not in METRICS:
        raise ConfigError(
            "sweep.metric", metric, f"there is no such metric.{did_you_mean(metric, list(METRICS))} There are {', '.join(METRICS)}"
        )
    if metric in MORE_IS_BETTER and sweep.direction == "minimize":
        raise ConfigError("sweep.metric", metric, "more of it is better; add sweep.direction=maximize")
    if metric.startswith("eval/") and not evaluated:
        raise ConfigError(
            "sweep.metric", metric, "not every job evaluates; set data.eval_path, and trainer.eval_interval to -1 or a number of steps"
        )
    if metric.startswith(("router/", "train/aux_loss")) and any(draft.config.model.moe is None for draft in jobs):
        raise ConfigError("sweep.metric", metric, "only models with experts have it (model.moe), and not every job has such a model")
    if sweep.early_stop and not metric.startswith("eval/"):
        raise ConfigError(
            "sweep.early_stop",
            True,
            f"jobs are judged by their evaluations during training, without {metric} (sweep.metric); use sweep.early_stop=false or another metric",
        )
    if sweep.early_stop and not (evaluated and all((draft.config.trainer.eval_interval or 0) > 0 for draft in jobs)):
        raise ConfigError(
            "sweep.early_stop", True, "jobs are judged by their evaluations during training; set trainer.eval_interval=N and data.eval_path"
        )
    return metric
