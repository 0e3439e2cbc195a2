"""A sweep as tables: sweep.csv (every job, full precision), sweep.md (the ranking, to read), and plain text for the terminal."""

from __future__ import annotations

import csv
import io
from typing import Any

from xtuner_hydra import words
from xtuner_hydra.reports.findings import TGS, TOKENS, Findings
from xtuner_hydra.results.sweep import Setting

MEMORY = "memory/max_gb"
FIRST = ("job", "overrides", "state", "steps", "train/loss", "eval/loss", TGS, "error")
LAST = (TOKENS, "seconds", MEMORY, "signature", "attempts")


def as_csv(findings: Findings) -> str:
    """One row per job, in their order, numbers as in metrics.jsonl. rank: of the job's setting."""
    buffer = io.StringIO()
    swept = list(dict.fromkeys(key for job in findings.result.jobs for key in job.swept))
    metric = [findings.metric] if findings.metric not in FIRST else []
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*FIRST, "rank", *metric, *swept, *LAST])
    for job in findings.result.jobs:
        numbers = [_exact(job.last(name)) for name in FIRST[4:7]]
        overrides = " ".join(job.run.overrides if job.run else job.job.overrides)
        first = [job.name, overrides, job.state, str(job.run.step if job.run else 0), *numbers, job.error]
        ranked = [_exact(findings.rank(findings.setting_of(job))), *(_exact(job.last(name)) for name in metric)]
        values = [_exact(job.swept.get(key)) for key in swept]
        seconds = job.run.seconds if job.run else None
        last = [_exact(job.last(TOKENS)), _exact(seconds), _exact(job.last(MEMORY)), job.job.signature, str(job.job.attempts)]
        writer.writerow([*first, *ranked, *values, *last])
    return buffer.getvalue()


def text(findings: Findings) -> str:
    """The ranking in columns for the terminal, the best one marked; then failures, the answer, and why it may mislead."""
    lines = ranking(findings)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    failed = [f"{job.name}: {job.state}{': ' if job.error else ''}{words.first_line(job.error, 120)}" for job in findings.failures]
    return "\n".join(
        [*table, *(["", *failed] if failed else []), "", findings.answer, *(f"Note: {doubt}" for doubt in findings.result.unfair)]
    )


def markdown(findings: Findings) -> str:
    """sweep.md."""
    result = findings.result
    parts = [
        f"# {_plain(findings.heading)}",
        findings.standing,
        f"**{_plain(findings.answer)}**" + (f" {_plain(findings.verdict_text)}" if findings.best else ""),
    ]
    if result.doubts:
        parts.append("\n>\n".join(f"> **Note**: {_plain(doubt)}" for doubt in result.doubts))
    parts.append(_markdown_table(ranking(findings)))
    if findings.effects_text:
        parts.append(_plain(findings.effects_text))
    if findings.failures:
        parts += [
            "## Failures",
            "\n".join(f"- `{job.name}` {job.state}: {_plain(words.first_line(job.error))}" for job in findings.failures),
        ]
    if findings.next:
        parts.append("## What to run next")
        parts += [part for what, command in findings.next for part in (_plain(what) + ":", _code(command))]
    parts.append("## How the jobs were compared\n\n" + "\n".join(f"- {name}: {_plain(value)}" for name, value in findings.basis))
    return "\n\n".join(parts) + "\n"


def ranking(findings: Findings) -> list[list[str]]:
    """The settings as cells, best first, below a line of headings. `1 *` is the best."""
    seeds = ["seeds"] * findings.has_repeats
    heads = ["", *(findings.short[key] for key in findings.keys), findings.metric, *seeds, "tokens", "tokens/s", "memory GB", "state"]
    return [heads, *(_cells(findings, setting) for setting in findings.settings)]


def _cells(findings: Findings, setting: Setting) -> list[str]:
    rank = findings.rank(setting)
    tokens, speed, memory = (findings.average(setting, name) for name in (TOKENS, TGS, MEMORY))
    return [
        f"{rank or '-'}{' *' if rank == 1 else ''}",
        *(findings.text(key, setting.swept.get(key)) for key in findings.keys),
        findings.score(setting),
        *[str(len(setting.values))] * findings.has_repeats,
        words.fixed(tokens, 0),
        words.fixed(speed, 0 if (speed or 0) >= 100 else 1),
        words.fixed(memory, 2),
        findings.setting_state(setting),
    ]


def _markdown_table(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def _code(text: str) -> str:
    """An indented block, which no text can break out of."""
    return "\n".join("    " + line for line in text.splitlines())


def _plain(cell: str) -> str:
    """Text that neither breaks a table nor is read as HTML."""
    return cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _exact(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, int | float) else str(value)
