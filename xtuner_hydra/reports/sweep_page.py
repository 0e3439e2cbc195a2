"""sweep.html: the answer first, then the evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from xtuner_hydra import words
from xtuner_hydra.reports import drawing, page, svg
from xtuner_hydra.reports.curves import Curve, Scale, curve, limits, smoothed, thinned
from xtuner_hydra.reports.drawing import ENDS, MetricScale
from xtuner_hydra.reports.findings import TGS, TOKENS, Findings
from xtuner_hydra.reports.markup import Content, Markup, tag
from xtuner_hydra.reports.page import Cell
from xtuner_hydra.reports.tables import MEMORY
from xtuner_hydra.results.sweep import JobResult, Setting

COLOURS = 6
MOST_BARS = 24


def sweep_page(findings: Findings) -> str:
    """The page."""
    result = findings.result
    return page.document(
        f"{findings.heading}: {findings.answer}",
        tag("div", tag("h1", findings.heading), tag("span", findings.standing), class_="top"),
        tag("p", findings.answer, class_="answer"),
        tag("div", _facts(findings), class_="facts"),
        page.note("Before you trust the ranking", result.doubts),
        _ranking(findings),
        *_charts(findings),
        _failures(findings),
        _next(findings),
        _jobs(findings),
        page.card("How the jobs were compared", page.pairs(list(findings.basis))),
    )


def _charts(findings: Findings) -> list[Content]:
    """The metric over what was swept, then the jobs over time, two charts side by side; parallel coordinates need the whole width."""
    main, over_time = _main_chart(findings), [_losses(findings), _evaluations(findings), _speed(findings)]
    if drawing.is_parallel(findings):
        return [main, _effects(findings), *_in_pairs(over_time)]
    return _in_pairs([main, *over_time])


def _in_pairs(cards: Sequence[Markup | None]) -> list[Content]:
    shown = [card for card in cards if card]
    return [page.group(shown[place : place + 2]) for place in range(0, len(shown), 2)]


def _facts(findings: Findings) -> list[Markup]:
    return [fact for fact in (_lead(findings), _fairness(findings), _fastest(findings)) if fact]


VERDICTS = {
    "clear": ("Clear lead", "good"),
    "unsure": ("Likely lead", "warn"),
    "chance": ("No clear winner", "bad"),
    "unknown": ("Chance not ruled out", "warn"),
    "tie": ("A tie", "warn"),
}


def _lead(findings: Findings) -> Markup:
    alone = ("No winner yet" if findings.best is None else "Only one result" if len(findings.settings) > 1 else "One setting", "")
    title, kind = VERDICTS.get(findings.verdict, alone)
    return page.fact(title, findings.verdict_text, kind)


def _fairness(findings: Findings) -> Markup | None:
    if len(findings.ranked) < 2:
        return None
    if findings.unfair:
        return page.fact("Not a fair comparison", f"{findings.unfair}. See below.", "bad")
    parts = []
    if findings.eval_tokens:
        alike = len(findings.eval_tokens) == 1
        parts.append(("the same " if alike else "by seed ") + f"{findings.span(findings.eval_tokens)} held-out tokens")
    if findings.tokens:
        parts.append(f"{words.compact(min(findings.tokens))} training tokens each")
    return page.fact("Fair comparison", _sentence(", ".join(parts)) if parts else "All jobs ran alike.", "good")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _fastest(findings: Findings) -> Markup | None:
    """Speed of the winner compared with the fastest."""
    if findings.best is None or (own := findings.average(findings.best, TGS)) is None:
        return None
    text = f"{words.fixed(own, 0)} tokens/s per device"
    if (found := findings.faster()) is None:
        compared, others = len(findings.comparable_speeds), len(findings.ranked) - 1
        of = "none" if compared == others else f"none of the {words.counted(compared, 'setting')} with different work per step"
        return page.fact("No setting is faster" if compared else "Speed", text + (f"; {of} is over 10 % faster." if compared else "."))
    fastest, times = found
    cost = (fastest.mean or 0.0) - (findings.best.mean or 0.0)
    side = "higher" if cost > 0 else "lower"
    return page.fact(
        f"{times - 1:.0%} faster is possible",
        f"{findings.name(fastest)}: {words.fixed(times * own, 0)} against {text}, {findings.metric} {findings.difference(abs(cost))} {side}.",
    )


# --- the ranking


def _ranking(findings: Findings) -> Markup:
    metric = MetricScale.of(findings)
    # the metric before the keys: on a narrow page the rest needs scrolling
    heads = ["", findings.metric, *["± spread"] * findings.has_repeats, *(findings.short[key] for key in findings.keys)]
    heads += ["", *["seeds"] * findings.has_repeats, "tokens", "tokens/s", "memory GB", "state"]
    rows = [_ranking_row(findings, setting, metric) for setting in findings.settings]
    direction = "lower" if findings.result.plan.direction == "minimize" else "higher"
    dots = " The strip shows every seed as a circle, the mean as a bar, the spread shaded." if findings.has_repeats else ""
    averaged = "; averaged over seeds" if findings.has_repeats else ""
    kinds = ["best" if findings.rank(setting) == 1 else "" for setting in findings.settings]
    table = page.table(heads, rows, kinds=kinds, jobs=_numbers(findings), most=12)
    return page.card("Ranking", table, sub=f"{findings.metric}, {direction} is better{averaged}.{dots}")


def _ranking_row(findings: Findings, setting: Setting, metric: MetricScale) -> list[Cell]:
    rank = findings.rank(setting)
    strip = svg.strip(setting.values, setting.mean, setting.spread, (metric.low, metric.high)) if setting.mean is not None else None
    spread = Cell("" if setting.spread is None else "± " + findings.difference(setting.spread), setting.spread, number=True)
    speed, memory = findings.average(setting, TGS), findings.average(setting, MEMORY)
    return [
        Cell(f"{rank} *" if rank == 1 else rank or "–", rank),
        Cell(findings.score(setting) if setting.mean is None else findings.number(setting.mean), setting.mean, number=True),
        *[spread] * findings.has_repeats,
        *(page.swept(setting.swept.get(key), findings.text(key, setting.swept.get(key))) for key in findings.keys),
        Cell(strip),
        *[Cell(_seeds(setting), len(setting.values), number=True)] * findings.has_repeats,
        page.number(findings.average(setting, TOKENS), 0),
        page.number(speed, 0 if (speed or 0) >= 100 else 1),
        page.number(memory, 2),
        _state(findings, setting),
    ]


def _seeds(setting: Setting) -> str:
    done = len(setting.values)
    return str(done) if done == setting.seeds else f"{done} of {setting.seeds}"


def _state(findings: Findings, setting: Setting) -> Cell:
    text = findings.setting_state(setting)
    if setting.stopped is not None:
        return Cell(tag("span", text, class_="state pruned"), text)
    states = {job.state for job in setting.jobs}
    return page.state(states.pop() if len(states) == 1 else text)


def _numbers(findings: Findings) -> list[str]:
    return [" ".join(str(job.number) for job in setting.jobs) for setting in findings.settings]


# --- charts


def _main_chart(findings: Findings) -> Markup | None:
    """A heat map for two swept values, a curve for one, parallel coordinates for more."""
    if not findings.ranked or not findings.keys:
        return None
    if drawing.grid(findings):
        return _heat_map(findings)
    return _curve_card(findings, findings.keys[0]) if len(findings.keys) == 1 else _parallel(findings)


def _heat_map(findings: Findings) -> Markup:
    rows, columns = drawing.grid(findings) or ([], [])
    first, second = findings.keys
    metric = MetricScale.of(findings)
    found = {(findings.at(setting, first), findings.at(setting, second)): setting for setting in findings.settings}
    head = tag(
        "tr",
        tag("th", f"{findings.short[first]} ↓", class_="axis"),
        [tag("th", findings.text(second, column), scope="col") for column in columns],
    )
    over = tag("tr", tag("th"), tag("th", findings.short[second] + " →", class_="axis", colspan=len(columns)))
    body = [
        tag(
            "tr",
            tag("th", findings.text(first, row), scope="row"),
            [_heat_cell(findings, found.get((row, column)), metric) for column in columns],
        )
        for row in rows
    ]
    return page.card(
        f"{findings.metric} by {findings.short[first]} and {findings.short[second]}",
        tag("div", tag("table", tag("thead", over, head), tag("tbody", body), class_="heat"), class_="scroll"),
        sub="The stronger the colour, the better; the frame marks the best."
        + (f" {findings.effects_text}" if findings.effects_text else ""),
    )


def _heat_cell(findings: Findings, setting: Setting | None, metric: MetricScale) -> Markup:
    if setting is None:
        return tag("td", "not run", class_="none")
    jobs = " ".join(str(job.number) for job in setting.jobs)
    if setting.stopped is not None:
        return tag("td", findings.score(setting), tag("small", "stopped early"), class_="none", data_job=jobs)
    if setting.mean is None:
        return tag("td", findings.setting_state(setting), class_="none", data_job=jobs)
    good = metric.goodness(setting)
    kinds = ["best"] * (findings.rank(setting) == 1) + ["dark"] * (good > 0.8)
    small = "± " + findings.difference(setting.spread) if setting.spread is not None else None
    share = round(8 + 84 * good)
    return tag(
        "td",
        findings.number(setting.mean),
        tag("small", small) if small else None,
        class_=" ".join(kinds) or None,
        style=f"--p:{share}%",
        data_job=jobs,
    )


def _points(findings: Findings, key: str) -> list[svg.Point]:
    return [
        svg.Point(
            findings.at(setting, key),
            value,
            setting.spread,
            setting.values,
            _setting_title(findings, setting),
            _kind(findings, setting),
            " ".join(str(job.number) for job in setting.jobs),
        )
        for setting in findings.shown
        if (value := setting.stopped if setting.mean is None else setting.mean) is not None
    ]


def _kind(findings: Findings, setting: Setting) -> str:
    """How a setting is drawn: a CSS class."""
    return "stopped" if setting.stopped is not None else "best" if findings.rank(setting) == 1 else ""


def _setting_title(findings: Findings, setting: Setting) -> str:
    title = f"{findings.name(setting)}\n{findings.metric} {findings.score(setting)}"
    return title + (f"\n{findings.setting_state(setting)}" if setting.stopped is not None else "")


STOPPED = " Dashed: stopped early, at the last value."


def _curve_card(findings: Findings, key: str) -> Markup:
    """The metric over the only key."""
    title = f"{findings.metric} by {findings.short[key]}"
    sub = "Means with their spread over seeds; the small circles are single jobs." if findings.has_repeats else ""
    sub += STOPPED if findings.stopped else ""
    return page.card(title, svg.curve(_points(findings, key), label=title, x_label=findings.short[key]), sub=sub)


def _parallel(findings: Findings) -> Markup:
    keys = findings.telling_keys[:7]
    scales = {key: Scale.of(findings.at(setting, key) for setting in findings.shown) for key in keys}
    metric = MetricScale.of(findings)
    axes = [svg.Axis.of(findings.short[key], scales[key]) for key in keys]
    axes.append(svg.Axis(findings.metric, {0.0: findings.number(metric.low), 1.0: findings.number(metric.high)}))
    tracks = [
        svg.Track(
            [*(scales[key](findings.at(setting, key)) for key in keys), metric.place(setting)],
            metric.goodness(setting),
            _setting_title(findings, setting),
            _kind(findings, setting),
            " ".join(str(job.number) for job in setting.jobs),
        )
        for setting in findings.shown
    ]
    return page.card(
        "All swept values",
        tag("div", svg.parallel(axes, tracks, label="parallel coordinates of all swept values"), class_="scroll"),
        sub="One line per setting, stronger the better it is, the best in orange; keys that move the metric most come first."
        + (STOPPED if findings.stopped else ""),
    )


def _effects(findings: Findings) -> Markup | None:
    """The metric over each key separately, if there are too many keys for one picture."""
    if len(findings.keys) < 2 or drawing.grid(findings) or len(findings.ranked) < 3:
        return None
    keys = [effect.key for effect in findings.effects[:6]]
    kind, size = ("pair", (svg.WIDTH, svg.HEIGHT)) if len(keys) in (2, 4) else ("trio", svg.SMALL)
    return page.group([_effect(findings, key, size) for key in keys], kind)


def _effect(findings: Findings, key: str, size: tuple[int, int]) -> Markup:
    """The metric over one key of several: its points are not joined, as other keys differ between them."""
    title = f"{findings.metric} by {findings.short[key]}"
    return page.card(title, svg.curve(_points(findings, key), label=title, x_label=findings.short[key], connect=False, size=size))


def _colours(findings: Findings) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """(job number -> CSS classes of its curve, legend)."""
    colours, entries = drawing.colours(findings, COLOURS)
    best = {job.number for job in findings.best.jobs} if findings.best else set()
    kinds = {number: ("km" if place is None else f"k{place}") + (" strong" if number in best else "") for number, place in colours.items()}
    return kinds, [("km" if place is None else f"k{place}", text) for place, text in entries]


def _losses(findings: Findings) -> Markup | None:
    """Training loss of all jobs over tokens, the best on top."""
    colours, entries = _colours(findings)
    evaluated_once = all(len(curve(job.run, "eval/loss")) <= 1 for job in findings.result.jobs if job.run)
    lines = [_loss_line(findings, job, colours[job.number], dots=evaluated_once) for job in _best_last(findings) if job.run]
    lines = [line for line in lines if len(line.curve)]
    if not lines:
        return None
    healthy = [line.curve for line in lines if "failed" not in line.kind] or [line.curve for line in lines]
    dots = [line.dots for line in lines if line.dots is not None]
    low, high = limits([*healthy, *dots])
    y_range = min(low, *(float(line.curve.y.min()) for line in lines)), high
    states = {job.state for job in findings.result.jobs}
    bad = [state for state in ("failed", "killed", "interrupted") if state in states]
    if findings.best and len(findings.settings) > 1 and entries and entries[0][1] != "best":
        entries.append((colours[findings.best.jobs[0].number], "best setting"))
    entries += [("|", "stopped early")] * ("pruned" in states) + [("×", " or ".join(bad))] * bool(bad)
    entries += [("○", "running")] * ("running" in states) + [("●", "evaluation")] * bool(dots)
    chart = svg.lines(lines, label="training loss of all jobs over tokens", x_label="tokens", y_range=y_range)
    return page.card("Training loss over tokens", chart, page.legend(entries), sub="Smoothed where long. Point at a curve to see its job.")


def _best_last(findings: Findings) -> list[JobResult]:
    return [job for setting in reversed(findings.settings) for job in reversed(setting.jobs)]


def _loss_line(findings: Findings, job: JobResult, kind: str, *, dots: bool) -> svg.Line:
    assert job.run is not None
    line = thinned(smoothed(curve(job.run, "train/loss"), 0.05))
    points = curve(job.run, "eval/loss") if dots else Curve(line.x[:0], line.y[:0])
    ended = {"pruned": " pruned", "failed": " failed", "killed": " failed", "interrupted": " failed"}.get(job.state, "")
    return svg.Line(line, _title(findings, job), kind + ended, str(job.number), ENDS.get(job.state, ""), points if len(points) else None)


def _title(findings: Findings, job: JobResult) -> str:
    scored = f"{findings.metric} {findings.number(job.value)}" if job.value is not None else job.state
    return f"job {job.number}: {findings.job_name(job)}\n{scored}"


def _evaluations(findings: Findings) -> Markup | None:
    """Evaluation loss over tokens, if any job was evaluated more than once."""
    colours, entries = _colours(findings)
    found = [(job, curve(job.run, "eval/loss")) for job in _best_last(findings) if job.run]
    if not any(len(line) > 1 for _, line in found):
        return None
    lines = []
    for job, line in found:
        kind = colours[job.number] + (" pruned" if job.state == "pruned" else "")
        dots = line if len(line) <= 30 else None
        lines.append(svg.Line(line, _title(findings, job), kind, str(job.number), ENDS.get(job.state, ""), dots))
    chart = svg.lines(lines, label="evaluation loss of all jobs over tokens", x_label="tokens")
    return page.card(
        "Evaluation loss over tokens", chart, page.legend(entries), sub="On the held-out data. Point at a curve to see its job."
    )


def _speed(findings: Findings) -> Markup | None:
    settings = [setting for setting in findings.settings if findings.average(setting, TGS) is not None]
    if not settings:
        return None
    shown = settings[:MOST_BARS]
    tops = {metric: max((findings.average(setting, metric) or 0) for setting in shown) for metric in (TGS, MEMORY)}
    digits = 0 if tops[TGS] >= 100 else 1
    rows = [
        [
            Cell(findings.name(setting), findings.rank(setting)),
            page.bar(findings.average(setting, TGS), tops[TGS], digits),
            page.bar(findings.average(setting, MEMORY), tops[MEMORY], 2),
        ]
        for setting in shown
    ]
    kinds = ["best" if findings.rank(setting) == 1 else "" for setting in shown]
    jobs = [" ".join(str(job.number) for job in setting.jobs) for setting in shown]
    more = f" The first {MOST_BARS} of {len(settings)} settings." if len(settings) > MOST_BARS else ""
    return page.card(
        "Speed and memory",
        page.table(["setting", "tokens/s", "peak GB"], rows, kinds=kinds, jobs=jobs, kind="bars", most=8),
        sub="Tokens per second per device from start to end; peak memory. In the order of the ranking." + more,
    )


# --- text


def _failures(findings: Findings) -> Markup | None:
    if not findings.failures:
        return None
    return page.card("Failures", [_failure(findings, job) for job in findings.failures])


def _failure(findings: Findings, job: JobResult) -> Markup:
    log = job.run.directory / "logs" / "rank0.log" if job.run else None
    parts = [
        page.link(job.run.directory, findings.result.directory, Path(job.name).name) if job.run else Path(job.name).name,
        tag("span", f"{job.state} after {words.counted(job.run.step, 'step') if job.run else 'nothing'}", class_=f"state {job.state}"),
        page.link(log, findings.result.directory, f"{job.name}/logs/rank0.log") if log and log.is_file() else None,
    ]
    return tag("div", tag("div", parts, class_="top"), tag("p", words.first_line(job.error, 400) or "no message"), class_="failure")


def _report_link(findings: Findings, job: JobResult) -> Content:
    """The job's number, with a link to its report if it has one."""
    report = job.run.directory / "report.html" if job.run else None
    return page.link(report, findings.result.directory, str(job.number)) if report and report.is_file() else str(job.number)


def _next(findings: Findings) -> Markup | None:
    if not findings.next:
        return None
    return page.card("What to run next", [[tag("p", f"{what}:"), page.command(command)] for what, command in findings.next])


def _jobs(findings: Findings) -> Markup:
    swept = list(dict.fromkeys(key for job in findings.result.jobs for key in job.swept))
    short = words.short(swept)
    heads = [
        "job",
        *(short[key] for key in swept),
        "state",
        "steps",
        "train/loss",
        "eval/loss",
        "tokens",
        "tokens/s",
        "memory GB",
        "time",
        "tries",
        "directory",
    ]
    rows = [_job_row(findings, job, swept) for job in findings.result.jobs]
    best = findings.result.best_job
    kinds = ["best" if job is best else "" for job in findings.result.jobs]
    jobs = [str(job.number) for job in findings.result.jobs]
    return page.card(
        "Jobs",
        page.table(heads, rows, kinds=kinds, jobs=jobs, most=24),
        sub="A job's number links to its own report, once it has one; the best single job is highlighted.",
    )


def _job_row(findings: Findings, job: JobResult, swept: list[str]) -> list[Cell]:
    seconds = job.run.seconds if job.run else None
    total = job.run.total_steps if job.run else None
    steps = "" if job.run is None else f"{job.run.step:,}" + (f" of {total:,}" if total and total != job.run.step else "")
    speed = job.last(TGS)
    return [
        Cell(_report_link(findings, job), job.number, number=True),
        *(page.swept(job.swept.get(key), findings.text(key, job.swept.get(key))) for key in swept),
        page.state(job.state),
        Cell(steps, job.run.step if job.run else None, number=True),
        page.number(job.last("train/loss"), 4),
        page.number(job.last("eval/loss"), 4),
        page.number(job.last(TOKENS), 0),
        page.number(speed, 0 if (speed or 0) >= 100 and math.isfinite(speed or 0) else 1),
        page.number(job.last(MEMORY), 2),
        Cell("" if seconds is None else words.duration(seconds), seconds, number=True),
        Cell(job.job.attempts, job.job.attempts, number=True),
        Cell(
            page.link(job.run.directory, findings.result.directory, job.name) if job.run else tag("span", job.name, class_="dim"), job.name
        ),
    ]
