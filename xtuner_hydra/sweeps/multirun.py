"""A sweep: every job is checked before the first one starts, each trains in workers of its own, one that fails does not stop the others, and a
table says how they ended. Hydra's sweeper and launcher go over the jobs; the table is made from what the jobs left in their directories."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from xtuner_hydra import launch, run_dir
from xtuner_hydra.app import App, Composition
from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, RefusedError
from xtuner_hydra.parallel.runtime import started_by_torchrun
from xtuner_hydra.sweeps import table

NO_CHECKPOINTS = "checkpoint=none"  # jobs keep nothing to resume from, or a sweep would fill the disk; say checkpoint=default to have it


def sweep(app: App) -> int:
    """Run the sweep of `app`'s command line; returns the exit code."""
    if started_by_torchrun():
        raise RefusedError("-m: a sweep starts workers of its own; run it without torchrun, with parallelism.nproc_per_node=N")
    if not any(override.startswith("checkpoint=") for override in app.overrides):
        app.overrides.insert(0, NO_CHECKPOINTS)
    directory = app.sweep_dir()
    _refuse_taken(directory)
    jobs = app.jobs()
    _check_all(app, jobs)
    print(f"sweep of {len(jobs)} jobs: {directory}", flush=True)
    return _Sweep(directory, len(jobs)).run(app)


@dataclass
class _Sweep:
    directory: Path
    jobs: int
    started: int = 0

    def run(self, app: App) -> int:
        """All jobs, then the table, which is written and shown after an interruption too."""
        interrupted = False
        try:
            app.multirun(self.train, self.directory)
        except KeyboardInterrupt:
            interrupted = True
        rows = table.write(self.directory)
        print(table.text(rows), flush=True)
        print(f"sweep: {self.directory / 'sweep.md'}", flush=True)
        if interrupted:
            return EXIT_INTERRUPTED
        return EXIT_DONE if len(rows) == self.jobs and all(row.state == "completed" for row in rows) else EXIT_FAILED

    def train(self, composition: Composition) -> float | None:
        """One job, in processes of its own; returns its last evaluation loss (else training loss) to Hydra's sweeper."""
        self.started += 1
        print(f"\njob {self.started}/{self.jobs}: {' '.join(_shown(composition.overrides))}", flush=True)
        if composition.config.tracking.wandb.group is None:
            composition.config.tracking.wandb.group = self.directory.name
        try:
            code = launch.run(dataclasses.replace(composition, overrides=_shown(composition.overrides)), isolated=True)
        except RefusedError as error:  # it passed before the sweep started: the data or the disk has changed since
            print(f"xtuner_hydra: {error}", file=sys.stderr)
            run_dir.write_status(
                composition.run_dir, "failed", exit_code=error.exit_code, error=str(error), overrides=composition.overrides
            )
            code = error.exit_code
        table.write(self.directory)
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        metrics = run_dir.read_status(composition.run_dir).get("metrics") or {}
        return metrics.get("eval/loss", metrics.get("train/loss"))


def _check_all(app: App, jobs: list[list[str]]) -> None:
    """Compose every job and check it with its data; the first that cannot be is refused with its overrides, before anything is created."""
    for number, overrides in enumerate(jobs):
        try:
            launch.prepare(app.compose([*overrides, *app.hydra_overrides()]))
        except RefusedError as error:
            raise RefusedError(f"job {number + 1} of {len(jobs)} ({' '.join(_shown(overrides))}): {error}") from None


def _refuse_taken(directory: Path) -> None:
    run_dir.refuse_unusable(directory, resuming=False, key="hydra.sweep.dir")
    if any((directory / name).exists() for name in ("sweep.csv", "multirun.yaml")):
        raise RefusedError(f"hydra.sweep.dir={directory}: holds a sweep already; choose another directory")


def _shown(overrides: list[str]) -> list[str]:
    """What the user typed, without our own addition."""
    return [override for override in overrides if override != NO_CHECKPOINTS]
