"""What a sweep prints while it runs: a live table on a terminal, one line per change otherwise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from xtuner_hydra.results.sweep import Job, SweepPlan
from xtuner_hydra.safe_text import printable

if TYPE_CHECKING:
    from rich.table import Table

    from xtuner_hydra.sweeps.driver import Followed


class Screen:
    """Use as a context manager around the sweep."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        class Unbroken(Console):
            """A sweep continues when the reader has gone (`| head`)."""

            def on_broken_pipe(self) -> None:
                self.quiet = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

        self.console = Unbroken(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        self.started_at = time.monotonic()

    def __enter__(self) -> Screen:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(f"[{_clock(time.monotonic() - self.started_at)}] {printable(text)}", markup=False)

    def started(self, job: Job, remark: str) -> None:
        """A job has started."""
        self.say(f"job {job.number} ({' '.join(job.overrides)}): started{f', {remark}' if remark else ''}")

    def ended(self, job: Job, outcome: str, why: str | None) -> None:
        """A job has ended."""
        reason = f": {why.splitlines()[0]}" if why else ""
        self.say(f"job {job.number} ({' '.join(job.overrides)}): {outcome}{reason}")

    def show(self, running: Sequence[Followed], plan: SweepPlan) -> None:
        """The running jobs, and how far the sweep is."""
        if self.live:
            self.live.update(_table(running, plan))


def _table(running: Sequence[Followed], plan: SweepPlan) -> Table:
    from rich.table import Table

    begun = sum(job.attempts > 0 for job in plan.jobs)
    title = f"{len(running)} running, {begun - len(running)} ended, {plan.total - begun} to come"
    table = Table(title=title, title_justify="left", expand=True)
    for name in ("job", "overrides"):
        table.add_column(name, overflow="fold")
    for name in ("step", "loss", "tokens/s", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for followed in running:
        table.add_row(str(followed.job.number), printable(" ".join(followed.job.overrides)), *_progress(followed))
    return table


def _progress(followed: Followed) -> tuple[str, str, str, str]:
    """step/total, loss, tokens/s, time left."""
    row = followed.last
    if "train/step" not in row:
        return f"0/{followed.total_steps}", "", "", "starting"
    step = int(row["train/step"] or 0)
    return (
        f"{step}/{followed.total_steps}",
        _number(row.get("train/loss"), 4),
        _number(row.get("throughput/e2e_tgs"), 0),
        _left(followed, step),
    )


def _left(followed: Followed, step: int) -> str:
    """At the pace of the last steps."""
    return _clock(mean(followed.step_times) * (followed.total_steps - step)) if followed.step_times else ""


def _number(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
