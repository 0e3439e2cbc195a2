"""`runs [DIR...]`: a line a run, sweeps' jobs included: how it stands, its last metrics, what was typed. Reads no Hydra and no torch."""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_hydra.config.names import split_override
from xtuner_hydra.config.strict import did_you_mean, known_keys, unknown_key
from xtuner_hydra.errors import EXIT_DONE, RefusedError
from xtuner_hydra.results.glance import Glance, glance
from xtuner_hydra.results.run import find_runs
from xtuner_hydra.safe_text import printable
from xtuner_hydra.words import HUGE

COLUMNS = ("run", "state", "steps", "train/loss", "eval/loss", "tokens/s", "overrides")
STATUS = ("state", "step", "total_steps")  # what --where and --sort know beside keys of the config and metrics
NARROWEST = 24
"""Characters of overrides below which a terminal's line is better broken in two."""

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


def main(argv: list[str]) -> int:
    """Print the list. Raises RefusedError for a directory that is not there and for a key that nobody knows."""
    args = _parser().parse_args(argv)
    for directory in args.directories:
        if not directory.is_dir():
            raise RefusedError(f"{directory}: no such directory")
    conditions = [Condition.parse(text) for text in args.where]
    runs = [glance(path) for path in find_runs(args.directories, damaged=True)]
    for key in [condition.key for condition in conditions] + ([args.sort] if args.sort else []):
        _refuse_unknown(key, runs)
    runs = [run for run in runs if all(condition.holds(run) for condition in conditions)]
    if args.sort:
        runs.sort(key=lambda run: _rank(_value(run, args.sort)))
    if args.json:
        print(json.dumps([_as_json(run) for run in runs], indent=2, ensure_ascii=False), flush=True)
    elif runs:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(table([_cells(run) for run in runs], width)), flush=True)
    else:
        print(f"no runs in {', '.join(map(str, args.directories))}{' for which this holds' if conditions else ''}", file=sys.stderr)
    return EXIT_DONE


@dataclass(frozen=True)
class Condition:
    """`optimizer.lr=6e-5`: holds for a run whose value is that, as a number where it is one."""

    text: str
    key: str
    compare: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition. Raises RefusedError for one that is none."""
        match = re.fullmatch(r"([^=<>!]+)(!=|>=|<=|=|>|<)(.*)", text, re.DOTALL)
        if match is None:
            raise RefusedError(f"--where {text}: write KEY=VALUE; != > < >= <= compare too (quote them for the shell)")
        key, compare, value = match[1].strip(), match[2], _typed(match[3].strip())
        if compare in ("<", ">", "<=", ">=") and not _is_number(value):
            raise RefusedError(f"--where {text}: {compare} compares numbers, and {match[3].strip() or 'nothing'} is none")
        return cls(text, key, compare, value)

    def holds(self, run: Glance) -> bool:
        """A run that has no such value (no evaluation yet) fails every condition."""
        value = _value(run, self.key, missing := object())
        if value is missing:
            return False
        if self.compare in ("=", "!="):
            # 1 is 1.0, but true is not 1
            return _COMPARE[self.compare]((isinstance(value, bool), value), (isinstance(self.value, bool), self.value))
        return _is_number(value) and _COMPARE[self.compare](value, self.value)


def table(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Lines of a table of COLUMNS: whole where `width` is None (a pipe), cut at the overrides where that fits, else two or more lines a run."""
    lines = [COLUMNS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS) - 1)]
    before = sum(widths) + 2 * len(widths)
    if width is not None and before + NARROWEST > width:
        return [line for row in rows for line in _stacked(row, width)]
    return [_cut("  ".join([*_padded(line, widths), line[-1]]).rstrip(), width) for line in lines]


def _padded(line: Sequence[str], widths: list[int]) -> list[str]:
    """All cells of `line` but the last; numbers to the right."""
    numbers = (2, 3, 4, 5)
    return [line[at].rjust(size) if at in numbers else line[at].ljust(size) for at, size in enumerate(widths)]


def _stacked(row: Sequence[str], width: int) -> list[str]:
    run, state, steps, *numbers, overrides = row
    told = [f"{name} {cell}" for name, cell in zip(COLUMNS[3:6], numbers, strict=True) if cell]
    rest = "  ".join([state, *([f"step {steps}"] if steps else []), *told, *([overrides] if overrides else [])])
    return [run, *textwrap.wrap(rest, max(width, 20), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)]


def _cut(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def _cells(run: Glance) -> list[str]:
    """Texts in the order of COLUMNS."""
    numbers = [_number(run.metrics.get(name), digits) for name, digits in (("train/loss", 4), ("eval/loss", 4), ("throughput/e2e_tgs", 1))]
    steps = f"{run.step}/{run.total_steps or '?'}" if run.damage is None else ""
    texts = [_path(run), run.state, steps, *numbers, run.damage or " ".join(map(_short, run.overrides))]
    return [printable(text).replace("\n", "\\n") for text in texts]


def _as_json(run: Glance) -> dict[str, Any]:
    return {
        "run": _path(run),
        "state": run.state,
        "step": run.step,
        "total_steps": run.total_steps,
        "overrides": run.overrides,
        "metrics": run.metrics,
        "error": run.damage or run.error,
    }


def _path(run: Glance) -> str:
    """As seen from here; whole where it is not below here."""
    relative = os.path.relpath(run.directory)
    return str(run.directory) if relative.startswith("..") else relative


def _short(override: str) -> str:
    """`lr=6e-5` for `optimizer.lr=6e-5`, and a path by its last part; the whole key where another ends alike."""
    key, value = split_override(override)
    tail = key.rpartition(".")[2]
    return f"{tail if _TAILS[tail] == 1 else key}={os.path.basename(value.rstrip('/')) if '/' in value and value[0] not in '[{' else value}"


_TAILS = Counter(key.rpartition(".")[2] for key in known_keys())


def _value(run: Glance, key: str, missing: Any = None) -> Any:
    if run.damage is not None and key != "state":
        return missing
    if key in STATUS:
        return getattr(run, key)
    return run.metrics.get(key, missing) if "/" in key else run.values.get(key, missing)


def _refuse_unknown(key: str, runs: list[Glance]) -> None:
    if "/" in key:
        metrics = sorted({name for run in runs for name in run.metrics})
        if runs and key not in metrics:
            raise RefusedError(f"{key}: none of the runs has this metric.{did_you_mean(key, metrics)}")
    elif key not in STATUS:
        is_group = known_keys().get(key)
        if is_group:
            inside = [known for known in known_keys() if known.startswith(key + ".")]
            raise RefusedError(f"{key}: a group, not a value; choose one of {', '.join(inside)}")
        if is_group is None:
            hint = did_you_mean(key, list(STATUS))
            raise RefusedError(f"{key}: there is no such key.{hint}") if hint else unknown_key(key)


def _typed(text: str) -> Any:
    """A number, true, false, null, a list, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rank(value: Any) -> tuple[int, Any]:
    """Numbers from the lowest, then texts, then what has no value."""
    if _is_number(value):
        return 0, value
    return (2, "") if value is None else (1, str(value))


def _number(value: Any, digits: int) -> str:
    return "" if not _is_number(value) else f"{value:.{digits}f}" if abs(value) < HUGE else f"{value:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtuner-hydra runs",
        description="List runs, sweeps' jobs included: state, steps, last train/loss and eval/loss, tokens/s, and what was typed.",
        epilog="example: xtuner-hydra runs --where optimizer.lr=6e-5 --where state=completed --sort eval/loss",
    )
    parser.add_argument("directories", metavar="DIR", nargs="*", type=Path, default=[Path("outputs")], help="where to look (outputs)")
    parser.add_argument(
        "--where",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"a key of the config, a metric, or one of {', '.join(STATUS)}; also != > < >= <=; given several times, all must hold",
    )
    parser.add_argument("--sort", metavar="METRIC", help="lowest first, by a metric or anything that --where knows (default: by path)")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    return parser
