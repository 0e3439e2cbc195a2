"""The table of a sweep, from the directories of its jobs: sweep.csv, sweep.md, and text for the screen."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_hydra.files import write_text
from xtuner_hydra.run_dir import read_overrides, read_status

COLUMNS = ("job", "overrides", "state", "steps", "train/loss", "eval/loss", "throughput/e2e_tgs", "error")


@dataclass(frozen=True)
class JobRow:
    """How one job stands; `metrics` are its last ones."""

    job: str
    overrides: list[str]
    state: str
    step: int
    metrics: dict[str, Any]
    error: str

    def cells(self) -> list[str]:
        """Texts in the order of COLUMNS; numbers at full precision."""
        metrics = ["" if self.metrics.get(name) is None else repr(self.metrics[name]) for name in COLUMNS[4:7]]
        return [self.job, " ".join(self.overrides), self.state, str(self.step), *metrics, self.error]


def read(directory: Path) -> list[JobRow]:
    """The jobs of a sweep in their order."""
    jobs = [path.parent for path in directory.glob("*/status.json")]
    return [_row(job) for job in sorted(jobs, key=_number_of)]


def write(directory: Path) -> list[JobRow]:
    """Write sweep.csv and sweep.md anew; returns the rows."""
    rows = read(directory)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([COLUMNS, *(row.cells() for row in rows)])
    write_text(directory / "sweep.csv", buffer.getvalue())
    write_text(directory / "sweep.md", _markdown(rows))
    return rows


def text(rows: list[JobRow]) -> str:
    """The table in columns; the best job by evaluation loss (else training loss) is marked."""
    lines = [["", *COLUMNS[1:]], *_rounded(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def best(rows: list[JobRow]) -> JobRow | None:
    """The completed job with the lowest evaluation loss; where nothing was evaluated, the lowest training loss."""
    done = [row for row in rows if row.state == "completed"]
    for name in ("eval/loss", "train/loss"):
        scored = [row for row in done if isinstance(row.metrics.get(name), int | float)]
        if scored:
            return min(scored, key=lambda row: row.metrics[name])
    return None


def _markdown(rows: list[JobRow]) -> str:
    lines = ["| " + " | ".join(["", *COLUMNS[1:]]) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |" for cells in _rounded(rows)]
    return "# Sweep\n\n" + "\n".join(lines) + "\n\n`*` marks the lowest evaluation loss (training loss where nothing was evaluated).\n"


def _rounded(rows: list[JobRow]) -> list[list[str]]:
    """Cells for reading: four decimals, the best marked, the job's number alone."""
    winner = best(rows)
    table = []
    for row in rows:
        cells = row.cells()
        cells[0] = row.job.split("_")[0] + (" *" if row is winner else "")
        cells[4:7] = [_number(row.metrics.get(name), digits) for name, digits in zip(COLUMNS[4:7], (4, 4, 1), strict=True)]
        cells[7] = row.error.splitlines()[0][:120] if row.error else ""
        table.append(cells)
    return table


def _number_of(job: Path) -> int:
    """`3_lr6e-05` -> 3; directories are named so by config/names.py."""
    number = job.name.split("_")[0]
    return int(number) if number.isdigit() else 0


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def _row(job: Path) -> JobRow:
    status = read_status(job)
    try:
        overrides = read_overrides(job)
    except OSError:  # refused before its directory was filled
        overrides = status.get("overrides") or []
    return JobRow(
        job.name, overrides, status.get("state", "unknown"), status.get("step") or 0, status.get("metrics") or {}, status.get("error") or ""
    )
