"""The report of a run, report.html: what was changed, how it went, what it left. Quick, because a run waits for it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from xtuner_hydra import words
from xtuner_hydra.config.names import split_override
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.files import tree_size, write_text
from xtuner_hydra.reports import commands, page, svg
from xtuner_hydra.reports.curves import SMOOTH_FROM, Curve, curve, limits, smoothed, thinned
from xtuner_hydra.reports.markup import Content, Markup, tag
from xtuner_hydra.reports.page import Cell
from xtuner_hydra.results.run import Run, load_run
from xtuner_hydra.results.sweep import SWEEP_FILE, SweepPlan
from xtuner_hydra.tracking.base import Sample

REPORT, CHANGED = "report.html", "changed.json"
SMALL = (("learning rate", "train/lr"), ("gradient norm", "train/grad_norm"), ("tokens per second per device", "throughput/tgs"),
         ("memory, peak so far, GB", "memory/max_gb"), ("pack utilisation", "throughput/pack_utilization"),
         ("model FLOPs utilisation", "throughput/mfu"))  # fmt: skip
NOTES = {
    "config.yaml": "the resolved config",
    "overrides.yaml": "what was typed",
    CHANGED: "what differs from the defaults",
    "status.json": "the state of the run",
    "environment.json": "versions, hardware, git",
    "bad_lines.jsonl": "lines that were left out",
    "data.json": "the prepared data",
    "metrics.jsonl": "one row per step",
    "samples.jsonl": "answers to the sample prompts",
    "loss.png": "the loss as a picture",
    "logs": "one text log per rank",
    "checkpoints": "to resume from",
    "hf": "Hugging Face exports",
    "tensorboard": "tensorboard --logdir",
    "wandb": "Weights & Biases",
    REPORT: "this page",
}


def write_run(directory: Path) -> Path:
    """Write report.html into the run directory, and return its path. Raises RefusedError if it holds no run."""
    path = directory / REPORT
    write_text(path, run_page(load_run(directory)))
    return path


def run_page(run: Run) -> str:
    """The page."""
    status = tag("span", run.state, class_=f"state {run.state}")
    return page.document(
        f"{run.name}: {_answer(run)}",
        tag("div", tag("h1", run.name), status, tag("span", _when(run)), class_="top"),
        tag("p", _answer(run), class_="answer"),
        _error(run),
        _changed(run),
        tag("div", _facts(run), class_="facts"),
        _loss(run),
        page.group([chart for title, metric in SMALL if (chart := _chart(run, title, metric))], "trio"),
        _evaluations(run),
        _samples(run),
        _environment(run),
        _files(run),
        page.folded("The whole config", tag("pre", (run.directory / "config.yaml").read_text(encoding="utf-8"), class_="box")),
    )


def _answer(run: Run) -> str:
    """The state of the run, in a sentence."""
    words_of = {"completed": "Completed", "running": "Running", "failed": "Failed", "interrupted": "Interrupted", "killed": "Killed"}
    steps = words.counted(run.step, "step")
    if run.total_steps and run.total_steps != run.step:
        steps = f"{run.step:,} of {words.counted(run.total_steps, 'step')}"
    text = f"{words_of.get(run.state, run.state.capitalize())} after {steps}"
    if tokens := run.final.get("train/total_tokens"):
        text += f" and {words.compact(tokens)} tokens"
    scores = [f"{name} {words.fixed(run.final[name], 3)}" for name in ("eval/loss", "train/loss") if name in run.final]
    return text + (f": {', '.join(scores)}." if scores else ".")


def _when(run: Run) -> str:
    parts = [str(run.environment.get("time", "")).replace("T", " ")]
    if run.seconds is not None:
        parts.append(words.duration(run.seconds))
    return ", ".join(filter(None, parts))


def _error(run: Run) -> Markup | None:
    """Why a run failed or was stopped."""
    text = str(run.status.get("error") or run.status.get("pruned") or "")
    if not text:
        return None
    first, _, rest = text.strip().partition("\n")
    log = run.directory / "logs" / "rank0.log"
    return tag(
        "div",
        tag("b", "Stopped by the sweep" if run.state == "pruned" else "What went wrong"),
        tag("p", first),
        tag("pre", rest, class_="box") if rest.strip() else None,
        tag("p", page.link(log, run.directory, "logs/rank0.log")) if log.is_file() else None,
        class_="note error",
    )


def _changed(run: Run) -> Markup:
    """What differs from the defaults; if that was not recorded, what was typed."""
    try:
        changed: dict[str, list[Any]] = json.loads((run.directory / CHANGED).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        rows = [[Cell(key, key), Cell(value, value)] for key, value in map(split_override, run.overrides)]
        table = (
            page.table(["override", "value"], rows, sortable=False)
            if rows
            else tag("p", "Nothing: it ran with the defaults.", class_="dim")
        )
        return page.card("What was changed", table, sub="The overrides as they were typed." if rows else "")
    rows = [
        [Cell(key, key), Cell(words.value(default), str(default), kind="dim"), Cell(tag("b", words.value(value)), str(value))]
        for key, (default, value) in changed.items()
    ]
    table = page.table(["key", "default", "this run"], rows) if rows else tag("p", "Nothing: it ran with the defaults.", class_="dim")
    return page.card("What differs from the defaults", table)


def _facts(run: Run) -> list[Markup]:
    facts = []
    if speed := run.final.get("throughput/e2e_tgs"):
        facts.append(page.fact(f"{words.fixed(speed, 0)} tokens/s", "per device, from start to end"))
    if memory := run.final.get("memory/max_gb"):
        facts.append(page.fact(f"{words.fixed(memory, 2)} GB", "peak memory per device"))
    filled = curve(run, "throughput/pack_utilization").y
    if len(filled):
        facts.append(page.fact(f"{filled.mean():.1%} full", "packs, on average"))
    if skipped := run.final.get("train/skipped_updates"):
        facts.append(page.fact(f"{skipped:,} updates skipped", "their loss or gradient was not finite", "bad"))
    return facts


def _loss(run: Run) -> Markup | None:
    train, evaluations = curve(run, "train/loss"), curve(run, "eval/loss")
    if not len(train) and not len(evaluations):
        return None
    lines = []
    if len(train) >= SMOOTH_FROM:
        lines.append(svg.Line(thinned(train, 500), "training loss of each step", "k0 faint"))
    if len(train):
        ending = "x" if run.state in ("failed", "killed", "interrupted") else "o" if run.state == "running" else ""
        lines.append(svg.Line(thinned(smoothed(train), 300), "training loss", "k0", end=ending))
    if len(evaluations):
        lines.append(svg.Line(evaluations, "evaluation loss", "k1", dots=evaluations))
    entries = [("k0", "training, smoothed" if len(train) >= SMOOTH_FROM else "training")] * bool(len(train))
    entries += [("k1", "evaluation")] * bool(len(evaluations))
    charts = [
        tag("div", svg.lines(lines, label="loss over tokens", x_label="tokens", size=size), class_=kind)
        for size, kind in (((1140, 340), "only-wide"), ((svg.WIDTH, svg.HEIGHT), "only-narrow"))
    ]
    return page.card("Loss over tokens", charts, page.legend(entries), sub="Cross-entropy per supervised token.")


def _chart(run: Run, title: str, metric: str) -> Markup | None:
    line = curve(run, metric)
    if not len(line):
        return None
    raw = thinned(line, 240)
    lines = [svg.Line(raw, title, "k0")]
    if metric not in ("train/lr", "memory/max_gb") and len(line) >= SMOOTH_FROM:
        lines = [svg.Line(raw, title, "k0 faint"), svg.Line(thinned(smoothed(line)), f"{title}, smoothed", "k0")]
    chart = svg.lines(lines, label=f"{title} over tokens", x_label="tokens", y_range=_range(metric, line), size=svg.SMALL)
    return page.card(title[:1].upper() + title[1:], chart)


def _range(metric: str, line: Curve) -> tuple[float, float]:
    """From zero if zero is meaningful; a share goes up to one."""
    low, high = limits([line])
    if metric == "throughput/pack_utilization":
        return min(0.9, low), 1.0
    return min(0.0, float(line.y.min())), high


def _evaluations(run: Run) -> Markup | None:
    rows = [row for row in run.rows if "eval/loss" in row]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("eval/")))
    heads = ["step", "trained on", *("held-out tokens" if name == "eval/tokens" else name.removeprefix("eval/") for name in names)]
    losses = [value for row in rows if (value := row["eval/loss"]) is not None]
    cells = [
        [page.number(row.get(name), 0) for name in ("train/step", "train/total_tokens")] + [_metric(row.get(name)) for name in names]
        for row in rows
    ]
    kinds = ["best" if losses and row["eval/loss"] == min(losses) else "" for row in rows]
    return page.card("Evaluation", page.table(heads, cells, kinds=kinds, most=20), sub="On the held-out data; lowest loss highlighted.")


def _samples(run: Run) -> Markup | None:
    """The answers to each prompt: the last one in full, earlier ones behind a click."""
    answers: dict[str, list[Sample]] = {}
    for sample in run.samples:
        answers.setdefault(sample["prompt"], []).append(sample)
    if not answers:
        return None
    return page.card("Samples", [_answers(prompt, given) for prompt, given in answers.items()], sub="Greedy answers, at each evaluation.")


def _answers(prompt: str, given: list[Sample]) -> Markup:
    *before, last = given
    return tag(
        "div",
        tag("p", tag("b", prompt), class_="apart"),
        _sample(last),
        tag("details", tag("summary", words.counted(len(before), "earlier answer")), map(_sample, reversed(before))) if before else None,
    )


def _sample(sample: Sample) -> Markup:
    return tag("div", tag("p", f"step {sample['train/step']:,}", class_="dim"), tag("pre", sample["text"], class_="box"))


def _metric(value: float | None) -> Cell:
    return Cell("–") if value is None else page.number(value, 0 if value == int(value) else 4 if abs(value) < 100 else 1)


def _environment(run: Run) -> Markup:
    environment = run.environment
    versions, hardware, git = (environment.get(name) or {} for name in ("versions", "hardware", "git"))
    rows: list[tuple[str, Content]] = [
        ("hardware", ", ".join(filter(None, [*(hardware.get("gpus") or []), hardware.get("cpu"), _count(hardware)]))),
        ("host", f"{hardware.get('host', '?')}, {hardware.get('system', '?')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("directory", environment.get("directory")),
        ("code", _code(git)),
    ]
    if git.get("diff"):
        rows.append(("changes", tag("details", tag("summary", "diff against the commit"), tag("pre", git["diff"], class_="box"))))
    command = _command(run)
    return page.card(
        "Environment",
        page.pairs(rows),
        tag("p", "Command line:", class_="dim apart") if command else None,
        page.command(command) if command else None,
    )


def _command(run: Run) -> str | None:
    """The command that repeats this run; that of its sweep would run all jobs."""
    if (run.directory.parent / SWEEP_FILE).is_file():
        with suppress(RefusedError):  # files beside a run must not cost it its report
            return commands.alone(SweepPlan.load(run.directory.parent), run.overrides)
    return run.environment.get("command")


def _count(hardware: dict[str, Any]) -> str:
    return f"{hardware['cores']} cores, {hardware.get('memory_gb')} GB" if "cores" in hardware else ""


def _code(git: dict[str, Any]) -> Content:
    if not git:
        return "not in a git repository"
    return [tag("code", str(git.get("commit", "?"))[:12]), " with uncommitted changes" if git.get("dirty") else ", no changes"]


def _files(run: Run) -> Markup:
    """The contents of the run directory, with sizes; without this page, as it is not written yet."""
    entries = sorted(path for path in run.directory.iterdir() if not path.name.startswith(".") and path.name != REPORT)
    rows = []
    for path in entries:
        count, size = tree_size(path)
        name = page.link(path, run.directory, path.name + ("/" if path.is_dir() else ""))
        files = words.counted(count, "file") if path.is_dir() else ""
        rows.append(
            [
                Cell(name, path.name),
                Cell(NOTES.get(path.name, ""), kind="dim"),
                Cell(files, count, number=True),
                Cell(words.bytes_(size), size, number=True),
            ]
        )
    return page.card("Files", page.table(["name", "what it is", "files", "size"], rows), sub=str(run.directory))
