"""`-m`: from a command line to a sweep that ends in an answer. All of a new sweep is drafted and checked before anything is created; a resumed
one takes its overrides from its directory."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtuner_hydra import run_dir
from xtuner_hydra.app import App
from xtuner_hydra.config.composition import Composition
from xtuner_hydra.config.names import as_typed, job_name, split_override
from xtuner_hydra.config.schema import SweepConfig
from xtuner_hydra.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PREEMPTED, RefusedError
from xtuner_hydra.machine import started_by_torchrun
from xtuner_hydra.parallel.runtime import gpu_count
from xtuner_hydra.reports.sweep import text, write_sweep
from xtuner_hydra.results.sweep import SWEEP_FILE, Job, JobResult, SweepPlan, read_sweep
from xtuner_hydra.safe_text import printable, redact
from xtuner_hydra.sweeps import draft as drafts
from xtuner_hydra.sweeps import forks, space
from xtuner_hydra.sweeps.draft import Draft
from xtuner_hydra.sweeps.driver import Driver, Launcher
from xtuner_hydra.sweeps.screen import Screen
from xtuner_hydra.sweeps.search import Drawn, Listed, Search
from xtuner_hydra.sweeps.slots import Slots
from xtuner_hydra.sweeps.submitit import Submitit

SLOTS = "hydra_plugins.xtuner_hydra.SlotsLauncher"
SUBMITIT = "hydra_plugins.xtuner_hydra.SubmititLauncher"
# what may differ in a resumed sweep: how jobs are run, not what they are
_HOW = ("sweep.resume", "sweep.retries", "sweep.fail_fast", "hydra/launcher", "hydra.launcher.", "hydra.sweep.dir")


def sweep(app: App) -> int:
    """Run the sweep of `app`'s command line; returns the exit code."""
    if started_by_torchrun():
        raise RefusedError("-m: a sweep starts its own workers; run it without torchrun, with parallelism.nproc_per_node=N")
    options = app.sweep_config()
    if secret := [override for override in app.overrides if redact(override) != override]:
        raise RefusedError(f"{redact(secret[0])}: holds a secret, and sweep.json stores the command; keep it in the environment")
    if app.sweeper != "basic":
        return _under_plugin(app, options)
    if options.resume is None:
        directory = app.sweep_dir()
        _refuse_taken(directory)
        return _run(app, drafts.draft(app, directory), None)
    with resumed(app) as (recorded, draft, plan):
        if not recorded.launches_elsewhere:
            _refuse_running(draft.directory, plan)
        return _run(recorded, draft, plan)


@contextmanager
def resumed(app: App) -> Iterator[tuple[App, Draft, SweepPlan]]:
    """The sweep that sweep.resume names, drafted again from the command that started it, in its working directory. Raises RefusedError."""
    directory = Path(app.sweep_config().resume or "").expanduser().resolve()
    plan = SweepPlan.load(directory)
    arguments = _recorded_arguments(app, plan)
    try:
        os.chdir(plan.directory or ".")
    except OSError as error:
        raise RefusedError(
            f"sweep.resume={directory}: was started in {plan.directory}, which cannot be entered ({error.strerror})"
        ) from None
    with App(arguments, typed=app.typed) as recorded:
        draft = drafts.draft(recorded, directory)
        if strange := {job.data for job in draft.jobs} - set(plan.data):
            raise RefusedError(
                f"sweep.resume={directory}: {len(strange)} data sets have changed since the sweep was started, so new jobs would not "
                "compare with the finished ones. Restore the data, or start another sweep"
            )
        yield recorded, draft, plan


def _run(app: App, draft: Draft, plan: SweepPlan | None) -> int:
    """Run the drafted sweep, from its beginning or from where `plan` left it."""
    launcher = choose_launcher(app, draft)
    with run_dir.alone_in(draft.directory, key="hydra.sweep.dir"):
        _refuse_overtaken(draft.directory, plan)
        return _run_alone(app, draft, plan or _new_plan(app, draft), launcher)


def _run_alone(app: App, draft: Draft, plan: SweepPlan, launcher: Launcher) -> int:
    search = _search(draft, plan)
    if draft.is_list:
        _list_jobs(plan, draft.listed)
    print(
        f"sweep of {plan.total} job{'s' * (plan.total != 1)}, {launcher.describe()}: {draft.directory}",
        *_notes(draft, plan),
        sep="\n",
        flush=True,
    )
    code = _driver(app, draft, plan, search, launcher).run()
    _show(draft.directory)
    if code != EXIT_DONE:
        print(f"continue with: python -m xtuner_hydra {as_typed('sweep.resume', draft.directory)}", flush=True)
    return code


def _under_plugin(app: App, options: SweepConfig) -> int:
    """A sweep whose jobs a sweeper plug-in of Hydra chooses, batch by batch."""
    from xtuner_hydra.sweeps import plugin

    directory = app.sweep_dir()
    if options.resume is not None or options.search != "grid" or options.params:
        raise RefusedError(
            f"hydra/sweeper={app.sweeper}: sweep.resume, sweep.search and sweep.params are for our own searches, not for a plug-in"
        )
    _refuse_taken(directory)
    plugin.register()
    fixed, codes = space.fixed_overrides(app), [EXIT_DONE]
    plan: SweepPlan | None = None
    alone = ExitStack()

    def batch(job_overrides: Sequence[Sequence[str]], first: int) -> list[JobResult]:
        nonlocal plan
        swept = [[text for text in job if text not in app.overrides] for job in job_overrides]
        draft = drafts.draft_list(app, options, fixed, swept, directory, first=first)
        if plan is None:
            alone.enter_context(run_dir.alone_in(directory, key="hydra.sweep.dir"))
            _refuse_overtaken(directory, None)
            plan = _new_plan(app, draft)
        plan.jobs += [one.job for one in draft.jobs]
        plan.total = len(plan.jobs)
        codes.append(_driver(app, draft, plan, Listed(), choose_launcher(app, draft)).run())
        if codes[-1] in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
            raise KeyboardInterrupt
        return read_sweep(directory).jobs[first:]

    try:
        with alone:
            app.multirun(batch)
    except KeyboardInterrupt:
        codes.append(EXIT_INTERRUPTED if codes[-1] != EXIT_PREEMPTED else EXIT_PREEMPTED)
    _show(directory)
    return max(codes)


def _driver(app: App, draft: Draft, plan: SweepPlan, search: Search, launcher: Launcher) -> Driver:
    def compose(number: int, overrides: list[str]) -> Composition:
        return drafts.compose(app, draft.fixed, overrides, number, draft.directory)

    def describe(number: int, overrides: list[str]) -> Job:
        """A job that a search has drawn. An invalid one is rejected when it is started."""
        try:
            composition = compose(number, overrides)
        except RefusedError:
            return Job(number, job_name(number, overrides), overrides, "")
        return Job(number, composition.run_dir.name, overrides, drafts.signature(composition.config, app.defaults))

    if isinstance(launcher, Slots):
        forks.begin_imports()  # during the preparation of the first job
    return Driver(draft.directory, plan, draft.sweep, search, launcher, compose, describe, Screen(), write_sweep)


def _show(directory: Path) -> None:
    print(printable(f"\n{text(read_sweep(directory))}"), flush=True)
    print(f"report: {directory / 'sweep.html'}", flush=True)


def _new_plan(app: App, draft: Draft) -> SweepPlan:
    return SweepPlan(
        overrides=app.overrides,
        search=draft.sweep.search,
        metric=draft.metric,
        direction=draft.sweep.direction,
        keep=draft.sweep.keep,
        swept=draft.swept,
        total=draft.total,
        data=sorted({job.data for job in draft.jobs}),
        directory=os.getcwd(),
        config_dir=app.args.config_dir and str(Path(app.args.config_dir).resolve()),
        config_name=app.args.config_name,
    )


def _list_jobs(plan: SweepPlan, listed: Sequence[Job]) -> None:
    """Plan the listed jobs. One with a known signature keeps its number, directory and attempts; the others get free numbers."""
    known = {job.signature: job for job in plan.jobs}
    free = itertools.count(1 + max((job.number for job in plan.jobs), default=-1))
    plan.jobs = [known.get(job.signature) or (_renumbered(job, next(free)) if known else job) for job in listed]
    plan.total = len(plan.jobs)


def _renumbered(job: Job, number: int) -> Job:
    return replace(job, number=number, name=re.sub(rf"^{job.number}(?!\d)", str(number), job.name))


def choose_launcher(app: App, draft: Draft) -> Launcher:
    """The launcher that hydra/launcher names, fitted to the jobs. Raises RefusedError for one that is unknown or not available."""
    name, options = app.launcher()
    target = options.pop("_target_", None)
    _refuse_unsaid_commands(app, options)
    ranks = max(job.ranks for job in draft.jobs)
    if target == SUBMITIT:
        return Submitit(options, draft.directory, ranks=ranks, jobs=draft.total)
    if target != SLOTS:
        raise RefusedError(f"hydra/launcher={name}: jobs of a sweep run in slots, or through submitit_local or submitit_slurm")
    if unknown := options.keys() - {"slots", "threads", "devices"}:
        raise RefusedError(f"hydra.launcher.{min(unknown)}: there is no such option; slots has slots, threads, devices")
    slots = Slots(**options)
    slots.fit(ranks, gpu_count(draft.jobs[0].config.trainer.device), max(job.memory_gb for job in draft.jobs), draft.total)
    return slots


def _refuse_unsaid_commands(app: App, options: dict[str, Any]) -> None:
    """RefusedError for shell commands and sbatch lines that come from a file and not from this command."""
    for key, value in options.items():
        if value and (key in ("setup", "additional_parameters") or "\n" in str(value)) and not app.may_run(f"hydra.launcher.{key}"):
            raise RefusedError(
                f"hydra.launcher.{key}={value}: goes into the script of every job, but comes from a file; add --trust to allow it"
            )


def _search(draft: Draft, plan: SweepPlan) -> Search:
    if draft.is_list:
        return Listed()
    known = [job.trial for job in plan.jobs if job.trial is not None]
    return Drawn(draft.parameters, draft.sweep, draft.directory, tokens=min(job.tokens for job in draft.jobs), known=known)


def _notes(draft: Draft, plan: SweepPlan) -> list[str]:
    """What the user should know before the first job starts."""
    notes = [
        f"ranked by {plan.metric} ({plan.direction}d)"
        + (", as not every job evaluates" if plan.metric == "train/loss" and draft.sweep.metric is None else "")
    ]
    twins = [job for job in draft.jobs if job.twin is not None and draft.is_list]
    notes += [f"job {job.job.number} ({' '.join(job.job.overrides)}) is the same as job {job.twin} and is left out" for job in twins]
    done = [job for job in plan.jobs if (draft.directory / job.name / "status.json").exists()]
    states = Counter(run_dir.state(draft.directory / job.name) for job in done)
    if done:
        notes.append("resumed: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    return notes


def _recorded_arguments(app: App, plan: SweepPlan) -> list[str]:
    """The command line that started the sweep, with this command's settings for how jobs are run. Raises RefusedError if anything else differs."""
    what = [override for override in app.overrides if not _is_how(override)]
    if what and set(what) != {override for override in plan.overrides if not _is_how(override)}:
        raise RefusedError(
            f"sweep.resume={app.sweep_config().resume}: that sweep was started with {' '.join(plan.overrides)}, not with {' '.join(what)}. "
            "Give no overrides, or the same ones; for other jobs start another sweep"
        )
    now = [override for override in app.overrides if _is_how(override)]
    keys = {key for key, _ in map(split_override, now)}
    before = [override for override in plan.overrides if split_override(override)[0] not in keys]
    options = [
        ["--config-dir", plan.config_dir] if plan.config_dir else [],
        ["--config-name", plan.config_name] if plan.config_name else [],
    ]
    return ["-m", *(["--trust"] if app.args.trust else []), *(word for option in options for word in option), *before, *now]


def _is_how(override: str) -> bool:
    return split_override(override)[0].startswith(_HOW)


def _refuse_taken(directory: Path) -> None:
    run_dir.refuse_unusable(directory, resuming=False, key="hydra.sweep.dir")
    if any((directory / name).exists() for name in (SWEEP_FILE, "sweep.csv", "multirun.yaml")):
        raise RefusedError(
            f"hydra.sweep.dir={directory}: holds a sweep already; choose another directory, or continue it with sweep.resume={directory}"
        )


def _refuse_running(directory: Path, plan: SweepPlan) -> None:
    """Two processes must not run the same jobs. Those of a sweep that was just killed are given a while to end."""
    if plan.state == "running" and run_dir.is_alive(plan.process, directory):
        raise RefusedError(
            f"sweep.resume={directory}: is still being run by process {plan.process['pid']} on {plan.process['host']}; end it first. "
            "(On another host it counts as dead only after 15 minutes without output)"
        )
    deadline = time.monotonic() + run_dir.DYING_SECONDS
    while alive := _running_jobs(directory, plan):
        if time.monotonic() > deadline:
            job, process = alive[0]
            raise RefusedError(
                f"sweep.resume={directory}: job {job.number} is still running (process {process['pid']} on {process['host']}); end it first"
            )
        time.sleep(0.2)


def _running_jobs(directory: Path, plan: SweepPlan) -> list[tuple[Job, dict[str, Any]]]:
    statuses = [(job, run_dir.read_status(directory / job.name)) for job in plan.jobs]
    return [(job, status["process"]) for job, status in statuses if run_dir.state_of(directory / job.name, status) == "running"]


def _refuse_overtaken(directory: Path, plan: SweepPlan | None) -> None:
    """RefusedError if another process has started or continued the sweep while its jobs were checked here. plan: as read before, None: new."""
    if plan is None:
        _refuse_taken(directory)
    elif SweepPlan.load(directory).time != plan.time:
        raise RefusedError(f"sweep.resume={directory}: another process has continued it in the meantime; check its state, then try again")
