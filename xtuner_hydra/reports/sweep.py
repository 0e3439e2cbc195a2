"""The report of a sweep: sweep.csv, sweep.md, sweep.html, sweep.png, each replaced atomically, so that it can be read while jobs run."""

from __future__ import annotations

from pathlib import Path

from xtuner_hydra.files import write_text
from xtuner_hydra.reports import tables
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.reports.pictures import sweep_png
from xtuner_hydra.reports.sweep_page import sweep_page
from xtuner_hydra.results.sweep import SweepResult, read_sweep

FILES = ("sweep.csv", "sweep.md", "sweep.html", "sweep.png")


def write_sweep(directory: Path) -> SweepResult:
    """Rewrite the four FILES from what the jobs of the sweep in `directory` have written so far. Raises RefusedError if there is no sweep."""
    result = read_sweep(directory)
    findings = Findings(result)
    write_text(directory / "sweep.csv", tables.as_csv(findings))
    write_text(directory / "sweep.md", tables.markdown(findings))
    write_text(directory / "sweep.html", sweep_page(findings))
    sweep_png(findings)
    return result


def text(result: SweepResult) -> str:
    """The ranking as a table for the terminal."""
    return tables.text(Findings(result))
