"""Runs a sweep's jobs: starts them in free slots, follows them, retries failed ones, and reports what became of each.

All that is known of a job is in its directory (status.json, metrics.jsonl) and in sweep.json; this process holds nothing that a later one
could not read there. So a killed sweep can be continued with `sweep.resume`."""

from __future__ import annotations

import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from xtuner_hydra import launch, run_dir
from xtuner_hydra.config.composition import Composition
from xtuner_hydra.config.schema import SweepConfig
from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_REFUSED, RefusedError, Stopped, TrainingError
from xtuner_hydra.results.glance import progress
from xtuner_hydra.results.sweep import SWEEP_FILE, Job, SweepPlan, job_result, results_of
from xtuner_hydra.signals import PREEMPTIONS, handled_by
from xtuner_hydra.sweeps.draft import continued
from xtuner_hydra.sweeps.screen import Screen
from xtuner_hydra.sweeps.search import Search
from xtuner_hydra.tracking import jsonl
from xtuner_hydra.tracking.base import Row
from xtuner_hydra.words import fixed

TICK_SECONDS = 0.2
KILL_SECONDS = 30
"""How long to wait for a killed job; one that does not end is left behind as running."""
REPORT_SHARE = 0.1
"""Largest share of the time spent on reports while jobs run: one on some hundred jobs takes seconds, and the next job would wait for it."""
MOST_TWINS = 50
"""Draws in a row that repeat earlier jobs before a search counts as exhausted."""
SETTLED = ("completed", "pruned")
"""States of a job that a resumed sweep leaves alone."""


class RunningJob(Protocol):
    """A job's process, here or elsewhere."""

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to close its files and end."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Launcher(Protocol):
    """Where jobs run."""

    capacity: int
    """How many jobs run at once."""
    elsewhere: bool
    """Whether they run on other machines, whose devices are not known here."""
    grace_seconds: int
    """How long a job that is asked to stop may take to close its files before it is killed."""

    def describe(self) -> str:
        """The place in a few words."""
        ...

    def start(self, directory: Path) -> RunningJob:
        """Start the job of a prepared run directory."""
        ...

    def adopt(self, directory: Path) -> RunningJob | None:
        """The job that an earlier process has started there and that is still queued or running; None if there is none."""
        ...


@dataclass
class Followed:
    """A running job, and what it has reported."""

    job: Job
    directory: Path
    process: RunningJob
    total_steps: int
    tail: jsonl.Tail
    last: Row = field(default_factory=dict)
    step_times: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    hopeless: str | None = None


class Driver:
    """One sweep. `compose(number, swept overrides)` gives a job's config and directory."""

    def __init__(
        self,
        directory: Path,
        plan: SweepPlan,
        options: SweepConfig,
        search: Search,
        launcher: Launcher,
        compose: Callable[[int, list[str]], Composition],
        describe: Callable[[int, list[str]], Job],
        screen: Screen,
        write_report: Callable[[Path], object],
    ) -> None:
        self.directory, self.plan, self.options = directory, plan, options
        self.search, self.launcher, self.compose, self.describe = search, launcher, compose, describe
        self.screen, self.write_report = screen, write_report
        self.running: list[Followed] = []
        self.waiting: list[Job] = []  # planned and without a result, or failed and to be retried
        self.retries: dict[int, int] = {}  # how many are left, by job number
        self.values: dict[int, float | None] = {}  # the metric of completed jobs, by job number
        self.stopped = False  # no further job is to start
        self.why_stopped: str | None = None
        self.signals: list[int] = []  # received so far
        self.started = time.monotonic()
        self.seconds_before = plan.seconds
        self.news = False  # anything that is not in the report yet
        self.next_report = self.started  # not before this time

    def run(self) -> int:
        """Run all jobs to their ends; returns the sweep's exit code. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP stop every job; the report is still written.

        Raises TrainingError, after stopping the jobs, if the sweep's directory can no longer be written."""
        for result in results_of(self.directory, self.plan).jobs:
            self.values[result.number] = result.value
            if (state := self._state(result.job)) in SETTLED:
                # one may have ended while no driver ran, as on a cluster, without the search being told
                self.search.tell(result.job.trial, result.value, pruned=state == "pruned")
            else:
                self.waiting.append(result.job)
        try:
            return self._run()
        except OSError as error:
            self._abandon()
            again = f"continue with sweep.resume={self.directory}" if (self.directory / SWEEP_FILE).is_file() else "start it again"
            raise TrainingError(f"{error.filename or self.directory}: {error.strerror}; the sweep stops. Fix that, then {again}") from None

    def _run(self) -> int:
        interrupted: int | None = None
        self._save("running")
        with self.screen, _signals_interrupt(self.signals):
            try:
                self._go_on()
            except KeyboardInterrupt:
                interrupted = EXIT_PREEMPTED if {*PREEMPTIONS} & {*self.signals} else EXIT_INTERRUPTED
                self.screen.say("stopping the jobs; Ctrl-C again to end them at once")
                self._stop_all()
            with handled_by(signal.SIG_IGN):  # an impatient third Ctrl-C must not cost the report
                completed = results_of(self.directory, self.plan).count(*SETTLED) == self.plan.total and not interrupted
                self._save("interrupted" if interrupted else "completed" if completed else "failed")
                self._report()
        return interrupted or (EXIT_DONE if completed else EXIT_FAILED)

    def _go_on(self) -> None:
        """Start and follow until nothing runs and nothing is left to start."""
        self._fill()
        while self.running:
            time.sleep(TICK_SECONDS)
            if self.signals:  # one whose KeyboardInterrupt a library has dropped or turned into an error of its own
                raise KeyboardInterrupt
            ended = [followed for followed in self.running if self._follow(followed)]
            for followed in ended:
                self._settle(followed)
            if self.stopped:
                self._stop_all()
            self._fill()
            if ended:
                self._save("running")
                self.news = True
            if self.news and time.monotonic() >= self.next_report:
                self._report()
            self.screen.show(self.running, self.plan)

    def _report(self) -> None:
        """Write the report; a failure must not stop the sweep."""
        began, self.news = time.monotonic(), False
        try:
            self.write_report(self.directory)
        except Exception as error:
            self.screen.say(
                f"the report could not be written ({type(error).__name__}: {error}); retry with xtuner-hydra report {self.directory}"
            )
        ended = time.monotonic()
        self.next_report = ended + (ended - began) * (1 / REPORT_SHARE - 1)

    def _fill(self) -> None:
        """Start jobs while there is room for one."""
        while not self.stopped and len(self.running) < self.launcher.capacity and (job := self._next()) is not None:
            self._start(job)

    def _next(self) -> Job | None:
        if self.waiting:
            return self.waiting.pop(0)
        for _ in range(MOST_TWINS):
            if len(self.plan.jobs) >= self.plan.total or (drawn := self.search.ask()) is None:
                return None
            trial, overrides = drawn
            same = [job for job in self.plan.jobs if job.overrides == overrides]  # and so need not be composed
            if not same:
                job = replace(self.describe(len(self.plan.jobs), overrides), trial=trial)
                same = [one for one in self.plan.jobs if job.signature and one.signature == job.signature]
            if not same:
                if any(one.name == job.name for one in self.plan.jobs):  # hydra.sweep.subdir does not tell them apart
                    job = replace(job, name=f"{job.number}_{job.name}")
                self.plan.jobs.append(job)
                self._save("running")
                return job
            self.search.tell(trial, job_result(same[0], self.directory, self.plan.metric).value)
        self.screen.say(f"the search only repeats earlier jobs; it ends with {len(self.plan.jobs)} jobs")
        self.plan.total = len(self.plan.jobs)
        return None

    def _start(self, job: Job) -> None:
        directory = self.directory / job.name
        if (process := self.launcher.adopt(directory)) is not None:
            self._follow_from_now(job, directory, process, run_dir.read_status(directory).get("total_steps") or 0, "was already started")
            return
        job.attempts += 1
        try:
            composition = continued(replace(self.compose(job.number, job.overrides), run_dir=directory))
            prepared = launch.prepare(composition, progress=False, elsewhere=self.launcher.elsewhere)
            launch.refuse_no_room(prepared)
            launch.create(prepared)
            self._save("running")
            process = self.launcher.start(directory)
        except RefusedError as error:  # drawn by a search, or its data or the disk has changed since it was checked
            self._refused(job, directory, str(error))
            return
        except KeyboardInterrupt:  # if a process was started nevertheless, it ends with this one
            launch.mark_stopped(directory, Stopped("stopped with its sweep", EXIT_INTERRUPTED))
            raise
        remark = "" if prepared.checkpoint is None else f"continues from {prepared.checkpoint.name}"
        self._follow_from_now(job, directory, process, prepared.data.plan.total_steps, remark)

    def _follow_from_now(self, job: Job, directory: Path, process: RunningJob, total_steps: int, remark: str) -> None:
        self.running.append(Followed(job, directory, process, total_steps, jsonl.Tail(directory / "metrics.jsonl")))
        self.screen.started(job, remark)

    def _follow(self, followed: Followed) -> bool:
        """Read what a job has written; True when it has ended."""
        code = followed.process.poll()
        for row in followed.tail.read():
            followed.last |= row
            followed.step_times.extend([row["throughput/step_time"] or 0.0] if "throughput/step_time" in row else [])
            value = row.get(self.plan.metric)
            if "eval/loss" not in row or value is None or followed.hopeless or code is not None:
                continue
            tokens = int(row["train/total_tokens"] or 0)
            if self.search.is_hopeless(followed.job.trial, tokens, value):
                followed.hopeless = f"{self.plan.metric} {value:.4f} after {tokens:,} tokens is behind other jobs"
                followed.process.stop()
        if code is None:
            return False
        self._write_end(followed, code)
        return True

    def _write_end(self, followed: Followed, code: int) -> None:
        """Complete status.json if the job could not, or if it does not know why it was stopped."""
        status = run_dir.read_status(followed.directory)
        fields = progress(followed.directory)
        if status.get("state") == "running" and (self.stopped or followed.hopeless):  # by us, before it could record it
            why = {"pruned": followed.hopeless} if followed.hopeless else {"error": f"stopped: {self.why_stopped or 'with its sweep'}"}
            run_dir.write_status(followed.directory, "interrupted", **fields, exit_code=EXIT_INTERRUPTED, **why)
        elif status.get("state") == "running":
            cause = (
                f"killed by signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
                if code < 0
                else f"exited with code {code}"
            )
            error = (
                f"the job was {cause}"
                if code < 0
                else f"the job {cause} without an error message; see {followed.directory / 'logs' / 'console.log'}"
            )
            run_dir.write_status(followed.directory, "failed", **fields, exit_code=EXIT_FAILED, error=error)
        elif followed.hopeless and status.get("state") == "interrupted":
            run_dir.write_status(followed.directory, "interrupted", **fields, exit_code=EXIT_INTERRUPTED, pruned=followed.hopeless)
        elif self.stopped and status.get("state") == "interrupted":
            error = f"stopped: {self.why_stopped or 'with its sweep'}"
            run_dir.write_status(followed.directory, "interrupted", **fields, exit_code=EXIT_INTERRUPTED, error=error)

    def _settle(self, followed: Followed) -> None:
        """Decide what an ended job means: a result, another attempt, the end of the sweep."""
        self.running.remove(followed)
        job, state = followed.job, self._state(followed.job)
        status = run_dir.read_status(followed.directory)
        left = self.retries.setdefault(job.number, self.options.retries)
        if state == "failed" and left and status.get("exit_code") != EXIT_REFUSED and not self.stopped:
            self.retries[job.number] -= 1
            self.screen.ended(
                job, f"failed, will be retried (retry {self.options.retries - left + 1} of {self.options.retries})", status.get("error")
            )
            self.waiting.insert(0, job)
            return
        self._conclude(job, state, status.get("error") or status.get("pruned"))

    def _refused(self, job: Job, directory: Path, error: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        run_dir.write_status(directory, "failed", exit_code=EXIT_REFUSED, error=error, overrides=job.overrides)
        self._conclude(job, "failed", error)

    def _conclude(self, job: Job, state: str, why: str | None) -> None:
        value = self.values[job.number] = job_result(job, self.directory, self.plan.metric).value
        best = self._best()
        if state in (*SETTLED, "failed"):
            self.search.tell(job.trial, value, pruned=state == "pruned")
        outcome = "" if value is None else f", {self.plan.metric} {fixed(value, 4)}{' (best so far)' if job.number == best else ''}"
        self.screen.ended(job, state + outcome, why)
        self._keep(best)
        if state == "failed" and self.options.fail_fast and not self.stopped:
            self.stopped, self.why_stopped = True, "another job failed (sweep.fail_fast)"
            self.screen.say("sweep.fail_fast: a job failed, so the others are stopped")

    def _best(self) -> int | None:
        """The number of the completed job with the best value, the earliest of equal ones."""
        done = [(self.plan.sign * value, number) for number, value in self.values.items() if value is not None]
        return min(done)[1] if done else None

    def _keep(self, best: int | None) -> None:
        """Remove the checkpoints and exports of finished jobs that sweep.keep does not name. Unfinished ones need theirs to continue."""
        if self.options.keep == "all":
            return
        for job in self.plan.jobs:
            if self._state(job) in SETTLED and not (self.options.keep == "best" and job.number == best):
                with suppress(RefusedError):  # what is outside the sweep's directory stays
                    run_dir.refuse_stray(self.directory / job.name, home=self.directory)
                    for name in ("checkpoints", "hf"):
                        shutil.rmtree(self.directory / job.name / name, ignore_errors=True)

    def _stop_all(self) -> None:
        """End every running job: ask, wait, and after a while (or on a second Ctrl-C) kill."""
        self.stopped = True
        for followed in self.running:
            followed.process.stop()
        with suppress(KeyboardInterrupt):
            self._wait(self.launcher.grace_seconds)
        with handled_by(signal.SIG_IGN):  # none is left behind
            for followed in self.running:
                followed.process.kill()
            self._wait(KILL_SECONDS)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            self._collect()
            time.sleep(TICK_SECONDS)

    def _abandon(self) -> None:
        """End every running job when nothing more can be recorded about it."""
        for followed in self.running:
            followed.process.stop()
        deadline = time.monotonic() + self.launcher.grace_seconds
        while any(followed.process.poll() is None for followed in self.running) and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)
        for followed in self.running:
            followed.process.kill()

    def _collect(self) -> None:
        for followed in [followed for followed in self.running if self._follow(followed)]:
            self._settle(followed)

    def _state(self, job: Job) -> str:
        directory = self.directory / job.name
        return run_dir.state(directory)

    def _save(self, state: str) -> None:
        self.plan.state, self.plan.time, self.plan.process = state, time.time(), run_dir.this_process()
        self.plan.seconds = self.seconds_before + time.monotonic() - self.started
        self.plan.save(self.directory)


@contextmanager
def _signals_interrupt(came: list[int]) -> Iterator[None]:
    """SIGTERM, SIGUSR1 (SLURM's warning) and SIGHUP end a sweep as Ctrl-C does; their numbers are added to `came`. Ctrl-C is handled too, as a
    process that a script runs in the background starts with SIGINT ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    with handled_by(interrupt):
        yield
