"""Any runs side by side: they are treated as the jobs of a sweep over the keys in which their configs differ, and get a sweep's page."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtuner_hydra.files import write_text
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.reports.sweep_page import sweep_page
from xtuner_hydra.results.run import Run
from xtuner_hydra.results.sweep import Job, JobResult, SweepPlan, SweepResult

APART = ("tracking.", "sweep.", "checkpoint.", "data.cache_dir", "data.num_workers")
"""Keys that change what a run leaves behind, not what it learns; they do not make two runs different."""


def write_comparison(runs: Sequence[Run], path: Path) -> SweepResult:
    """Write the page that compares `runs` to `path`."""
    result = compare(runs, path.parent)
    write_text(path, sweep_page(Findings(result, title=path.stem)))
    return result


def compare(runs: Sequence[Run], directory: Path) -> SweepResult:
    """The runs as a sweep whose page is in `directory`. Runs with the same config are repeats of one setting."""
    keys = differing(runs)
    evaluated = any("eval/loss" in run.final for run in runs)
    jobs = [_job(run, number, keys, directory) for number, run in enumerate(runs)]
    metric = "eval/loss" if evaluated else "train/loss"
    plan = SweepPlan([], "runs side by side", metric, "minimize", "all", keys, len(runs), jobs, state="")
    plan.config_dir = next(filter(None, map(_config_dir, runs)), None)
    return SweepResult(directory.resolve(), plan, [JobResult.of(job, run, metric) for job, run in zip(jobs, runs, strict=True)])


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys whose values are not the same in all `runs`, in the order of the config."""
    keys = dict.fromkeys(key for run in runs for key in run.values if not key.startswith(APART))
    return [key for key in keys if len({_text(run.values.get(key)) for run in runs}) > 1]


def _job(run: Run, number: int, keys: Sequence[str], directory: Path) -> Job:
    overrides = [f"{key}={_text(run.values.get(key))}" for key in keys]
    return Job(number, os.path.relpath(run.directory, directory.resolve()), overrides, signature="", attempts=1)


def _config_dir(run: Run) -> str | None:
    """--config-dir of the command that started `run`, as an absolute path."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    known, _ = parser.parse_known_args(shlex.split(run.environment.get("command") or ""))
    return os.path.join(run.environment.get("directory") or "", known.config_dir) if known.config_dir else None


def _text(value: Any) -> str:
    return repr(value)
