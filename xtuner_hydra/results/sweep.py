"""A sweep to read: its plan (sweep.json), its jobs' directories, who is best, and whether that is a fair comparison.

A *setting* is what jobs that differ only in the seed have in common; settings are ranked by their mean over seeds.

sweep.json   overrides     what was typed (a resumed sweep must not differ)
             search, metric, direction, keep
             swept         the keys that vary, in the order they were given
             total         jobs in all; those of a search join `jobs` as they are drawn
             jobs          number, name (the directory), overrides (the swept values), signature, attempts, trial (of a search)
             data          fingerprints of the data that the jobs train and are judged on
             directory     working directory of the command, which relative paths start from
             config_dir    --config-dir and --config-name of the command, null without
             config_name
             process       host, pid, started of the process that runs the sweep; state, seconds (in all), time
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from xtuner_hydra import run_dir
from xtuner_hydra.config.names import is_plain, split_override
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.files import write_json
from xtuner_hydra.results.run import Run, load_run

SWEEP_FILE = "sweep.json"
SEED = "trainer.seed"
FAIR = 0.02
"""Settings whose training tokens differ by a larger share are not compared at equal tokens."""


@dataclass
class Job:
    """A job as planned. overrides: its swept values, `optimizer.lr=1e-5`. signature: of its non-default values."""

    number: int
    name: str
    overrides: list[str]
    signature: str
    attempts: int = 0
    trial: int | None = None  # number in Optuna's study, for a job that a search has drawn


@dataclass
class SweepPlan:
    """sweep.json."""

    overrides: list[str]
    search: str
    metric: str
    direction: str
    keep: str
    swept: list[str]
    total: int
    jobs: list[Job] = field(default_factory=list)
    state: str = "running"
    seconds: float = 0.0
    time: float = 0.0
    process: dict[str, Any] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    directory: str = ""
    config_dir: str | None = None
    config_name: str | None = None

    @property
    def sign(self) -> int:
        """What a value is multiplied by so that less is better."""
        return 1 if self.direction == "minimize" else -1

    def save(self, directory: Path) -> None:
        """Write sweep.json."""
        write_json(directory / SWEEP_FILE, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> SweepPlan:
        """Read it. Raises RefusedError if there is none."""
        run_dir.refuse_stray(directory / SWEEP_FILE, home=directory)
        try:
            values = json.loads((directory / SWEEP_FILE).read_text(encoding="utf-8"))
            plan = cls(**{**values, "jobs": [Job(**job) for job in values["jobs"]]})
        except (OSError, ValueError, KeyError, TypeError):
            raise RefusedError(f"{directory}: not a sweep's directory (it has no readable {SWEEP_FILE})") from None
        for job in plan.jobs:
            if not is_plain(str(job.name)):  # files are written, and removed, there
                raise RefusedError(
                    f"{directory}: {SWEEP_FILE} calls a job {job.name!r}, which is a path; a job's directory is in the sweep's"
                )
        return plan


@dataclass(frozen=True)
class JobResult:
    """A job in its present state. `run` is None while it waits, and if it was rejected before its directory was filled.

    value: of the sweep's metric, None until the job has completed. error: why it failed, from status.json.
    stopped: the last value of the metric if the sweep stopped the job early."""

    job: Job
    run: Run | None
    value: float | None
    state: str  # waiting, or a run's state
    error: str = ""
    stopped: float | None = None

    @classmethod
    def of(cls, job: Job, run: Run, metric: str) -> JobResult:
        """A job that has a run."""
        last = run.final.get(metric)
        value = last if last is not None and math.isfinite(last) else None
        error = str(run.status.get("error") or "")
        return cls(job, run, value if run.state == "completed" else None, run.state, error, value if run.state == "pruned" else None)

    @property
    def number(self) -> int:
        return self.job.number

    @property
    def name(self) -> str:
        return self.job.name

    @cached_property
    def swept(self) -> dict[str, Any]:
        """Swept key -> this job's value: typed if the key is a value of the config, text if it is a group."""
        typed = self.run.values if self.run else {}
        return {key: typed.get(key, _typed(text)) for key, text in _texts(self.job).items()}

    @property
    def seed(self) -> int | None:
        """trainer.seed, whether it was swept or not; None for a waiting job that does not set it."""
        return self.swept.get(SEED, self.run.config.trainer.seed if self.run else None)

    def last(self, metric: str) -> float | None:
        """The job's last value of `metric`."""
        return self.run.final.get(metric) if self.run else None


@dataclass(frozen=True)
class Setting:
    """Jobs that differ only in their seed. mean, spread: of `values` (spread: standard deviation, None for one)."""

    swept: dict[str, Any]
    jobs: list[JobResult]

    @cached_property
    def completed(self) -> list[JobResult]:
        """The jobs with a value, one per seed: the same seed again is the same experiment, not another sample, and the last one counts."""
        return list({job.seed: job for job in self.jobs if job.value is not None}.values())

    @cached_property
    def by_seed(self) -> dict[int | None, float]:
        """Seed -> value."""
        return {job.seed: job.value for job in self.completed if job.value is not None}

    @property
    def values(self) -> list[float]:
        return list(self.by_seed.values())

    @cached_property
    def stopped(self) -> float | None:
        """If no job completed: the mean of the values at which the sweep stopped them early."""
        values = [job.stopped for job in self.jobs if job.stopped is not None]
        return mean(values) if values and not self.values else None

    @cached_property
    def seeds(self) -> int:
        """Distinct seeds of all jobs, completed or not."""
        return max(1, len({job.seed for job in self.jobs} - {None}))

    @property
    def mean(self) -> float | None:
        return mean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class SweepResult:
    """Jobs in their order, and what follows from them."""

    directory: Path
    plan: SweepPlan
    jobs: list[JobResult]

    @cached_property
    def settings(self) -> list[Setting]:
        """Best first; then those stopped early, by their last value; those without a value last, in their jobs' order."""
        groups: dict[str, list[JobResult]] = {}
        for job in self.jobs:
            # by the override's text: a waiting job has no typed values yet, and must not be set apart from its twins
            groups.setdefault(repr(_without_seed(_texts(job.job))), []).append(job)
        settings = [Setting(_without_seed(_started_first(jobs).swept), jobs) for jobs in groups.values()]
        return sorted(settings, key=self._place)

    def _place(self, setting: Setting) -> tuple[int, float]:
        if setting.mean is not None:
            return 0, self.plan.sign * setting.mean
        return (2, 0.0) if setting.stopped is None else (1, self.plan.sign * setting.stopped)

    @property
    def best_setting(self) -> Setting | None:
        return self.settings[0] if self.settings and self.settings[0].mean is not None else None

    @cached_property
    def best_job(self) -> JobResult | None:
        """The completed job with the best value."""
        done = [(self.plan.sign * job.value, place) for place, job in enumerate(self.jobs) if job.value is not None]
        return self.jobs[min(done)[1]] if done else None

    def count(self, *states: str) -> int:
        """Jobs in any of `states`."""
        return sum(job.state in states for job in self.jobs)

    @cached_property
    def unfair(self) -> list[str]:
        """Why the settings do not compare, a sentence each; empty if they do. Seeds of one setting may differ: all settings have the same ones."""
        ranked = [setting for setting in self.settings if setting.mean is not None]
        return [text for text in (_unlike_evaluations(ranked), _unlike_tokens(ranked), _noisy(self.plan.metric)) if text]

    @property
    def doubts(self) -> list[str]:
        """Why the ranking may mislead, a sentence each: an unfair comparison, one across seeds, or an incomplete one."""
        return [*self.unfair, *(text for text in (self._other_seeds(), self._unfinished(), self._without_value()) if text)]

    def _other_seeds(self) -> str | None:
        """For a key that was zipped with the seed, or runs that differ in both."""
        seeds = [set(setting.by_seed) for setting in self.settings if setting.by_seed]
        if all(seeds[0] & other for other in seeds[1:]):
            return None
        return (
            "Settings were run with different seeds, so what looks like a difference between settings may be one between seeds. "
            "Give all of them the same seeds: trainer.seed=0,1,2 in a grid."
        )

    def _unfinished(self) -> str | None:
        left = self.plan.total - self.count("completed", "pruned")
        if left <= 0:
            return None
        failed, damaged = self.count("failed", "killed"), self.count("damaged")
        rest = left - failed - damaged
        parts = [f"{count} {what}" for count, what in ((failed, "failed"), (damaged, "cannot be read"), (rest, "did not end")) if count]
        return f"Of {self.plan.total} jobs {', '.join(parts)}; the ranking is of the others."

    def _without_value(self) -> str | None:
        count = sum(job.state == "completed" and job.value is None for job in self.jobs)
        if not count or not self.best_job:
            return None
        return f"Of {self.plan.total} jobs {count} completed without a finite {self.plan.metric}; the ranking is of the others."


def read_sweep(directory: Path) -> SweepResult:
    """Read a sweep's directory. Raises RefusedError if it holds none."""
    directory = directory.resolve()
    return results_of(directory, SweepPlan.load(directory))


def results_of(directory: Path, plan: SweepPlan) -> SweepResult:
    """The jobs of `plan` as `directory` has them."""
    return SweepResult(directory, plan, [job_result(job, directory, plan.metric) for job in plan.jobs])


def job_result(job: Job, sweep_dir: Path, metric: str) -> JobResult:
    """A job as its directory has it."""
    directory = sweep_dir / job.name
    try:
        run_dir.refuse_stray(directory, home=sweep_dir)
        status = run_dir.read_status(directory)
        # status.json is the last of the files that a run starts with, so a run that has it can be read
        run = load_run(directory) if status and (directory / "config.yaml").is_file() else None
    except RefusedError as error:  # one job must not cost the others their report
        return JobResult(job, None, None, "damaged", str(error))
    if run:
        return JobResult.of(job, run, metric)
    return JobResult(job, None, None, str(status.get("state", "waiting")), str(status.get("error") or ""))


def _texts(job: Job) -> dict[str, str]:
    """Swept key -> its value as typed."""
    return dict(map(split_override, job.overrides))


def _typed(text: str) -> Any:
    """The number that `text` spells, or `text`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _started_first(jobs: Sequence[JobResult]) -> JobResult:
    return next((job for job in jobs if job.run), jobs[0])


def _without_seed(swept: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in swept.items() if key != SEED}


def _means(settings: Sequence[Setting], metric: str) -> list[float]:
    """Per setting, the mean of the last `metric` of its completed jobs; settings without one are left out."""
    found = ([value for job in setting.completed if (value := job.last(metric)) is not None] for setting in settings)
    return [mean(values) for values in found if values]


def _unlike_evaluations(ranked: Sequence[Setting]) -> str | None:
    counts = sorted(set(map(round, _means(ranked, "eval/tokens"))))
    if len(counts) < 2:
        return None
    if _tokenised_differently(ranked):
        return (
            f"The settings' held-out text was tokenised differently ({counts[0]:,} to {counts[-1]:,} supervised tokens), and a loss per token "
            "does not compare between tokenizers or chat templates. With data.eval_ratio their held-out samples differ too; data.eval_path gives "
            "all of them the same."
        )
    return (
        f"The settings were evaluated on different held-out tokens ({counts[0]:,} to {counts[-1]:,} supervised ones), so their eval/loss does "
        "not compare. Set data.max_length to one value for all, or evaluate on shorter data."
    )


def _tokenised_differently(ranked: Sequence[Setting]) -> bool:
    """Whether the same held-out files have become other tokens."""
    parts = [job.run.data.get("eval") or {} for setting in ranked for job in setting.completed if job.run]
    hashes, fingerprints = ({json.dumps(part.get(name)) for part in parts} for name in ("hashes", "fingerprint"))
    return len(hashes) == 1 and len(fingerprints) > 1


def _unlike_tokens(ranked: Sequence[Setting]) -> str | None:
    tokens = _means(ranked, "train/total_tokens")
    jobs = [job for setting in ranked for job in setting.completed]
    planned = {job.run.config.trainer.total_tokens for job in jobs if job.run}
    if not tokens or max(tokens) - min(tokens) <= FAIR * max(tokens):
        return None
    if len(planned) == 1 and None not in planned and max(tokens) - min(tokens) <= _largest_step(jobs):
        return None  # each stops with the step that reaches trainer.total_tokens
    return (
        f"The settings were trained on different numbers of tokens ({min(tokens):,.0f} to {max(tokens):,.0f}), so the longer ones have an "
        "advantage. Set trainer.total_tokens to compare at equal tokens."
    )


def _largest_step(done: Sequence[JobResult]) -> float:
    """Tokens of the largest last step."""
    return max(job.last("train/tokens") or 0 for job in done)


def _noisy(metric: str) -> str | None:
    if metric != "train/loss":
        return None
    return "The jobs are ranked by the loss of their last training step, which is noisy. Give data.eval_path to rank by held-out data."
