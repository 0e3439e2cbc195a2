"""`report DIR... [--to FILE]`: write the report of a run or of a sweep anew, or one page that compares many runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from xtuner_hydra.errors import EXIT_DONE, RefusedError
from xtuner_hydra.reports.comparison import write_comparison
from xtuner_hydra.reports.run import write_run
from xtuner_hydra.reports.sweep import FILES, text, write_sweep
from xtuner_hydra.results.run import Run, find_runs, load_run
from xtuner_hydra.results.sweep import SWEEP_FILE, read_sweep
from xtuner_hydra.safe_text import printable

DEFAULT = Path("comparison.html")


def main(argv: list[str]) -> int:
    """Write what the directories call for, and say where it is."""
    arguments = _parser().parse_args(argv)
    for directory in arguments.directories:
        if not directory.is_dir():
            raise RefusedError(f"report: {directory} is not a directory; give run directories, sweeps, or directories that hold some")
    try:
        written = _write(arguments)
    except OSError as error:
        raise RefusedError(f"report: {error.filename or 'a file'}: {error.strerror}; --to FILE writes elsewhere") from None
    print("\n".join(f"wrote {path}" for path in written))
    return EXIT_DONE


def _write(arguments: argparse.Namespace) -> list[Path]:
    first = arguments.directories[0] if len(arguments.directories) == 1 and arguments.to is None else None
    if first and (first / SWEEP_FILE).is_file():
        print(printable(text(read_sweep(first))))
        write_sweep(first)
        return [first / name for name in FILES]
    if first and (first / "config.yaml").is_file():
        return [write_run(first)]
    return [_compare(arguments.directories, arguments.to or DEFAULT)]


def _compare(directories: list[Path], to: Path) -> Path:
    runs = _readable(find_runs(directories))
    if not runs:
        raise RefusedError(f"report: there is no run in or below {', '.join(map(str, directories))}")
    if not to.parent.is_dir():
        raise RefusedError(f"report: --to {to}: {to.parent} is not a directory")
    write_comparison(runs, to)
    return to


def _readable(directories: Iterable[Path]) -> list[Run]:
    """The runs, but those that this version cannot read: one of many must not cost the others their page."""
    runs = []
    for directory in directories:
        try:
            runs.append(load_run(directory))
        except RefusedError as error:
            print(f"left out: {printable(str(error))}", file=sys.stderr)
    return runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtuner-hydra report", description="Write the report of a run, of a sweep, or of many runs side by side."
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run, a sweep, or a directory that holds some")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="compare all runs found on this page (several directories: comparison.html)"
    )
    return parser
