"""Ends a run if one of its ranks hangs, and says which one and where.

A rank that hangs leaves all others waiting in a collective operation, and each sees only that it waits. So every rank counts the edges
it has passed (stopping.py); one that has passed none for `timeout` seconds writes its count and its stack to logs/rankR.stuck.json, reads
those of the others, and all reach the same verdict: the ranks that gave no sign, else those that are behind, else those that are not waiting."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from xtuner_hydra.errors import EXIT_FAILED
from xtuner_hydra.files import write_json

GRACE_SECONDS = 10.0
"""How long a rank waits for the others' reports: they stopped at most about a micro-batch later."""

log = logging.getLogger("xtuner_hydra")


class Watchdog:
    """Watches the main thread of rank `rank` of `world_size` while its block runs.

    progress(): a number that keeps changing while all is well. on_verdict(rank, error, stack): called before the process ends itself; `rank` is
    the one that hangs."""

    def __init__(
        self,
        logs: Path,
        rank: int,
        world_size: int,
        timeout: float,
        progress: Callable[[], int],
        on_verdict: Callable[[int, str, str], None],
    ) -> None:
        self.logs = logs
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.progress = progress
        self.on_verdict = on_verdict
        self._done = threading.Event()
        self._main = threading.main_thread().ident

    def __enter__(self) -> None:
        if self.world_size > 1:
            self._report_of(self.rank).unlink(missing_ok=True)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()

    def _watch(self) -> None:
        seen, since = self.progress(), time.monotonic()
        while not self._done.wait(min(1.0, self.timeout / 10)):
            if self.progress() != seen:
                seen, since = self.progress(), time.monotonic()
            elif time.monotonic() - since > self.timeout:
                self._end()
                seen, since = self.progress(), time.monotonic()

    def _end(self) -> None:
        """End this process, unless it has moved on or ended by the time that all ranks have reported."""
        stack = traceback.format_stack(sys._current_frames()[self._main])  # type: ignore[index]
        text = "".join(stack)
        log.error(f"rank {self.rank} has not moved for {self.timeout:g} s:\n{text}", extra={"file_only": True})
        report = {
            "edges": self.progress(),
            "waits": any(place in "".join(stack[-3:]) for place in ("/torch/distributed/", f"in {read_back.__name__}\n")),
            "where": stack[-1].strip(),
            "stack": text,
        }
        write_json(self._report_of(self.rank), report)
        reports = self._reports()
        if self._done.is_set() or self.progress() != report["edges"]:
            self._report_of(self.rank).unlink(missing_ok=True)
            return
        culprits = verdict(reports, self.world_size)
        if self.rank == min(set(reports) & set(culprits) or reports):  # one reports for all
            rank, stack_of = culprits[0], reports.get(culprits[0], {}).get("stack", "(no stack: it gave no sign)\n")
            self.on_verdict(rank, describe(culprits, reports, self.timeout), stack_of)
        else:
            time.sleep(GRACE_SECONDS / 2)  # the launcher ends all ranks once one has gone: let the reporting one go first
        os._exit(EXIT_FAILED)

    def _reports(self) -> dict[int, dict[str, Any]]:
        """The reports by rank; there is none from a rank that is stopped or holds the interpreter's lock."""
        end = time.monotonic() + GRACE_SECONDS
        reports: dict[int, dict[str, Any]] = {}
        while len(reports) < self.world_size and time.monotonic() < end:
            time.sleep(0.2)
            for rank in set(range(self.world_size)) - set(reports):
                if (path := self._report_of(rank)).exists():
                    reports[rank] = json.loads(path.read_text(encoding="utf-8"))
        return reports

    def _report_of(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.stuck.json"


def read_back(values: Tensor) -> list[float]:
    """The numbers on the CPU. On a GPU collective operations return at once, and a rank waits here for the others."""
    return values.tolist()


def verdict(reports: dict[int, dict[str, Any]], world_size: int) -> list[int]:
    """The ranks that hang; all of them if nothing tells them apart."""
    if silent := sorted(set(range(world_size)) - set(reports)):
        return silent
    behind = min(report["edges"] for report in reports.values())
    if len(late := [rank for rank in sorted(reports) if reports[rank]["edges"] == behind]) < world_size:
        return late
    return [rank for rank in sorted(reports) if not reports[rank]["waits"]] or sorted(reports)


def describe(culprits: list[int], reports: dict[int, dict[str, Any]], timeout: float) -> str:
    """The verdict in one sentence."""
    others = f" (as do ranks {', '.join(map(str, culprits[1:]))})" if len(culprits) > 1 else ""
    told = reports.get(culprits[0])
    where = f"in {' '.join(told['where'].split())}" if told else "and gave no sign of life: stopped, swapped out, or stuck in one call"
    return f"rank {culprits[0]} hangs{others}: no progress for {timeout:g} s (parallelism.timeout), {where}"
