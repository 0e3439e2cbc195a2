"""`diff RUN RUN`: what differs between two runs: config, environment, code, data, metrics. The exit code is 0 whether or not anything does."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from xtuner_hydra.config.strict import changed
from xtuner_hydra.errors import EXIT_DONE
from xtuner_hydra.results.run import Run, load_run
from xtuner_hydra.safe_text import printable

SHORT = 60
"""Lines of a difference between two uncommitted changes that are still shown."""

PARTS = ("train", "eval")
_ABSENT = "absent"


def main(argv: list[str]) -> int:
    """Print the comparison. Raises RefusedError where one of the two is not a run."""
    parser = argparse.ArgumentParser(
        prog="xtuner-hydra diff",
        description="What differs between two runs: config, environment, code, data, metrics. Equal parts take one line. "
        "The exit code is 0, equal or not, and 2 where a RUN cannot be read.",
    )
    parser.add_argument("runs", metavar="RUN", nargs=2, help="a run directory")
    first, second = (load_run(directory) for directory in parser.parse_args(argv).runs)
    print(printable("\n".join(compare(first, second))), flush=True)
    return EXIT_DONE


def compare(a: Run, b: Run) -> Iterator[str]:
    """The comparison, line by line."""
    for name, run in (("a", a), ("b", b)):
        yield f"{name}: {run.directory}  ({run.state}, step {run.step}/{run.total_steps or '?'})"
    yield from _part("config", _arrows(changed(b.config, a.config)), f"all {len(a.values)} keys")
    yield from _part("environment", _arrows(_differences(_environment(a), _environment(b))), "versions, hardware, threads, ranks")
    yield from _code(a.environment.get("git"), b.environment.get("git"))
    same_content = [_hashes(a, part) == _hashes(b, part) for part in PARTS]
    yield from _part("data", _arrows(_differences(_data(a, same_content), _data(b, same_content))), _described(a))
    yield from _metrics(a, b)


def first_difference(a: Run, b: Run, metric: str = "train/loss") -> tuple[int, float, float] | None:
    """(step, value in `a`, value in `b`) of the first step that both have logged and at which `metric` differs; None where none does."""
    in_a, in_b = _by_step(a, metric), _by_step(b, metric)
    for step in sorted(in_a.keys() & in_b.keys()):
        if in_a[step] != in_b[step]:
            return step, in_a[step], in_b[step]
    return None


def _part(name: str, lines: list[str], equal: str) -> list[str]:
    return ["", f"{name}: {len(lines)} differ", *lines] if lines else ["", f"{name}: equal ({equal})"]


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = dict.fromkeys([*a, *b])
    return {key: (a.get(key, _ABSENT), b.get(key, _ABSENT)) for key in keys if a.get(key, _ABSENT) != b.get(key, _ABSENT)}


def _arrows(differences: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """`  optimizer.lr  6e-05 -> 0.0001`, in columns."""
    width = max(map(len, differences), default=0)
    return [f"  {key.ljust(width)}  {_told(before)} -> {_told(after)}" for key, (before, after) in differences.items()]


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _environment(run: Run) -> dict[str, Any]:
    """What of environment.json says how the run was computed, not where and when."""
    versions, hardware = run.environment.get("versions", {}), run.environment.get("hardware", {})
    own = {key: run.environment[key] for key in ("threads", "ranks") if key in run.environment}
    return {**versions, **{key: hardware[key] for key in ("system", "cpu", "cores", "memory_gb", "gpus") if key in hardware}, **own}


def _code(a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[str]:
    """Commits, and the changes that were not committed."""
    commits = [part["commit"] if part else "no git repository" for part in (a, b)]
    changes = [part["diff"] if part else "" for part in (a, b)]
    if commits[0] == commits[1] and changes[0] == changes[1]:
        return ["", f"code: equal ({commits[0][:12] if a else commits[0]}{', the same uncommitted changes' if changes[0] else ''})"]
    lines = _arrows(_differences({"commit": commits[0]}, {"commit": commits[1]}))
    if changes[0] == changes[1]:
        return ["", "code: differs", *lines, f"  uncommitted changes: {'equal' if changes[0] else 'none'}"]
    return ["", "code: differs", *lines, *_changes(*changes)]


def _changes(a: str, b: str) -> list[str]:
    """Two diffs against their commits as a diff of diffs."""
    lines = list(difflib.unified_diff(a.splitlines(), b.splitlines(), "a", "b", lineterm=""))
    told = f"  uncommitted changes differ: {len(a.splitlines())} lines in a, {len(b.splitlines())} in b"
    return [f"{told}:", *(f"    {line}" for line in lines)] if len(lines) <= SHORT else [f"{told} (git.diff in environment.json)"]


def _data(run: Run, same_content: list[bool]) -> dict[str, Any]:
    """data.json by key; files by name only where their contents differ, as the same data may lie elsewhere."""
    flat: dict[str, Any] = {"tokenizer": run.data.get("tokenizer")}
    for part, same in zip(PARTS, same_content, strict=True):
        described = run.data.get(part) or {}
        files = {} if same else dict(zip(described.get("files", []), _hashes(run, part), strict=False))
        flat |= {f"{part} {file}": digest[:12] for file, digest in files.items()}
        flat |= {
            f"{part} {key}": described.get(key) for key in ("fingerprint", "samples", "tokens", "truncated", "dropped", "unsupervised")
        }
        flat |= {f"{part} selected {key}": value for key, value in described.get("selected", {}).items()}
    return flat


def _hashes(run: Run, part: str) -> list[str]:
    return (run.data.get(part) or {}).get("hashes", [])


def _described(run: Run) -> str:
    train = run.data.get("train")
    return f"{train['samples']} samples, {train['tokens']} tokens, fingerprint {train['fingerprint'][:12]}" if train else "not recorded"


def _metrics(a: Run, b: Run) -> list[str]:
    """Final values side by side, then where the two runs part."""
    names = [name for name in dict.fromkeys([*a.final, *b.final]) if name != "train/step"]
    rows = [("", "a", "b", "b - a"), *(_row(name, a.final.get(name), b.final.get(name)) for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = ["  " + "  ".join([row[0].ljust(widths[0]), *(row[at].rjust(widths[at]) for at in (1, 2, 3))]).rstrip() for row in rows]
    return ["", f"metrics: {_parting(a, b)}", *(table if names else [])]


def _row(name: str, a: float | None, b: float | None) -> tuple[str, str, str, str]:
    told = ["" if value is None else f"{value:.6g}" for value in (a, b)]
    if a is None or b is None:
        return name, told[0], told[1], ""
    share = f" ({(b - a) / abs(a):+.2%})" if a and math.isfinite(b - a) else ""
    return name, told[0], told[1], "equal" if a == b else f"{b - a:+.4g}{share}"


def _parting(a: Run, b: Run) -> str:
    shared = len(_by_step(a, "train/loss").keys() & _by_step(b, "train/loss").keys())
    if not shared:
        return "no step that both have logged"
    if (parted := first_difference(a, b)) is None:
        return f"train/loss is equal, bit for bit, at all {shared} steps that both have logged"
    step, in_a, in_b = parted
    return f"train/loss differs first at step {step}: {in_a!r} -> {in_b!r} ({in_b - in_a:+.3g})"


def _by_step(run: Run, metric: str) -> dict[int, float]:
    """Step -> value, NaN and infinities (null in metrics.jsonl) left out."""
    return {int(row["train/step"] or 0): row[metric] for row in run.rows if row.get(metric) is not None}  # type: ignore[misc]
