"""The page of a sweep: right at any moment, whole, safe, and needing nothing but itself."""

import html
import json
import re
import shutil
import subprocess
import time

import pytest
from pages import check
from runs import evaluation, finished, make_sweep, step

from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.reports.sweep import FILES, text, write_sweep
from xtuner_hydra.reports.sweep_page import sweep_page
from xtuner_hydra.results.sweep import read_sweep

LR, PACK, SEED = "optimizer.lr", "data.pack_max_length", "trainer.seed"
EVIL = "<script>alert(1)</script> \"quoted\" 'too' & <img src=x onerror=alert(2)>"
FAILED = {"rows": [step(1, 9.0), step(2, None)], "state": "failed", "error": f"step 2: {EVIL}\nmore"}


def grid(lrs=(1e-5, 6e-5), packs=(64, 128), seeds=(0, 1)):
    return [
        ({LR: lr, PACK: pack, SEED: seed}, finished(2.0 + abs(lr - 6e-5) * 1e4 + pack / 1000 + seed / 100))
        for lr in lrs
        for pack in packs
        for seed in seeds
    ]


def page_of(directory, jobs, **options):
    """The page alone: drawing sweep.png takes longer."""
    return check(sweep_page(Findings(read_sweep(make_sweep(directory, jobs, **options)))))


def test_all_files_are_written_and_nothing_else_is_left(tmp_path):
    make_sweep(tmp_path, grid())
    before = {path.name for path in tmp_path.iterdir()}
    result = write_sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before | set(FILES)
    assert text(result).splitlines()[1].startswith("1 *")


def test_the_answer_comes_first_then_doubts_then_the_ranking(tmp_path):
    words = page_of(tmp_path, [*grid(), ({LR: 1e-4, PACK: 64, SEED: 0}, FAILED)]).words
    answer = words.index("lr 6e-5, pack_max_length 64 wins: eval/loss 2.0690 ± 0.0071 over 2 seeds, 0.0640 below the next")
    doubt, ranking = words.index("Of 9 jobs 1 failed"), words.index("Ranking")
    assert answer < doubt < ranking
    assert "Clear lead" in words
    assert "Fair comparison The same 500 held-out tokens, 300 training tokens each." in words


STATES = {
    "nothing has begun": [({LR: 1e-4}, None), ({LR: 2e-4}, None)],
    "one runs": [({LR: 1e-4}, {"rows": [step(1, 3.0)], "state": "running"}), ({LR: 2e-4}, None)],
    "one runs without a step": [({LR: 1e-4}, {"rows": [], "state": "running"})],
    "all failed": [({LR: 1e-4}, FAILED), ({LR: 2e-4}, FAILED)],
    "pruned": [({LR: 1e-4}, {"rows": [step(1, 3.0), evaluation(1, 3.0)], "pruned": "hopeless"}), ({LR: 2e-4}, finished(2.0))],
    "interrupted": [({LR: 1e-4}, {"rows": [step(1, 3.0)], "state": "interrupted"}), ({LR: 2e-4}, finished(2.0))],
    "equal values": [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, finished(2.0))],
    "two alike to the last bit": [({LR: lr, SEED: seed}, finished(2.0)) for lr in (1e-4, 2e-4) for seed in (0, 1)],
    "only seeds": [({SEED: seed}, finished(2.0 + seed)) for seed in (0, 1, 2)],
    "words and nulls": [
        ({"scheduler.name": name, "scheduler.warmup_ratio": ratio}, finished(2.0)) for name in ("linear", "cosine") for ratio in (None, 0.1)
    ],
    "lists": [({"optimizer.betas": betas, LR: 1e-4}, finished(2.0 + betas[0])) for betas in ([0.9, 0.95], [0.8, 0.9])],
    "three keys": [({LR: 1e-4 * n, PACK: 64 + n, "optimizer.eps": 1e-8 * (n % 3 + 1)}, finished(2.0 + n)) for n in range(1, 8)],
    "no evaluation": [({LR: lr}, {"rows": [step(1, 3.0), step(2, 2.0)]}) for lr in (1e-4, 2e-4)],
}


@pytest.mark.parametrize("jobs", STATES.values(), ids=STATES)
def test_a_page_can_be_made_at_any_moment(tmp_path, jobs):
    words = page_of(tmp_path, jobs, state="running").words
    for _, job in jobs:
        state = "pruned" if (job or {}).get("pruned") else (job or {}).get("state", "completed") if job else "waiting"
        assert state in words


def test_untrusted_text_stays_text(tmp_path):
    jobs = [({"model.tokenizer": EVIL}, finished(2.0)), ({"model.tokenizer": "byte"}, FAILED | {"overrides": [f"data.path={EVIL}"]})]
    write_sweep(make_sweep(tmp_path, jobs))
    page, markdown = (tmp_path / "sweep.html").read_text(), (tmp_path / "sweep.md").read_text()
    assert EVIL in check(page).words
    assert "<script>alert" not in page
    assert "<img" not in page
    assert [line for line in markdown.splitlines() if "<script" in line and not line.startswith("    ")] == []


def test_links_are_relative_and_lead_somewhere(tmp_path):
    make_sweep(tmp_path, [*grid(), ({LR: 1e-4, PACK: 64, SEED: 0}, FAILED)])
    (tmp_path / "0_job" / "report.html").write_text("a report")
    write_sweep(tmp_path)
    links = check((tmp_path / "sweep.html").read_text()).links
    assert [link for link in links if link.endswith("report.html")] == ["0_job/report.html"]  # no other job has one
    assert "8_job/logs/rank0.log" in links
    assert all((tmp_path / link).exists() for link in links)


def test_the_chart_suits_the_number_of_keys(tmp_path):
    def classes(name, jobs):
        return {value for attribute, value in page_of(tmp_path / name, jobs).attributes if attribute == "class"}

    charts = {"heat", "point best", "chart parallel"}
    assert classes("one", grid(packs=(64,))) & charts == {"point best"}
    assert classes("two", grid()) & charts == {"heat"}
    assert classes("three", STATES["three keys"]) & charts == {"chart parallel", "point best"}


def test_eighteen_long_jobs_take_a_second_or_two(tmp_path):
    """Bounded generously: it runs after every job, and minutes would be a fault."""
    rows = [step(number, 5.0 / number**0.2) for number in range(1, 1001)]
    jobs = [({LR: lr, SEED: seed}, {"rows": [*rows, evaluation(1000, lr * 1e4 + seed)]}) for lr in (1e-5, 2e-5, 3e-5) for seed in range(6)]
    make_sweep(tmp_path, jobs)
    started = time.process_time()
    write_sweep(tmp_path)
    assert time.process_time() - started < 15
    assert (tmp_path / "sweep.html").stat().st_size < 400_000


PROBE = """<script>
addEventListener("error", event => { document.title = "error: " + event.message; });
addEventListener("load", () => setTimeout(() => {
  const curve = document.querySelector("svg[data-range] .series .line"), box = curve.getBoundingClientRect(), svg = curve.closest("svg");
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 1, clientY: box.bottom - 1, bubbles: true}));
  const head = [...document.querySelectorAll("th button")].find(button => button.textContent === "eval/loss");
  head.click(); head.click();
  const first = document.querySelector("tbody tr").children[0].textContent;
  document.title = JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth, lit: document.querySelectorAll(".series.lit").length,
    tip: document.querySelector(".tip.on")?.textContent ?? "", first,
  });
}, 50));
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1400])
def test_in_a_browser_nothing_overflows_and_the_script_works(tmp_path, width):
    page = sweep_page(Findings(read_sweep(make_sweep(tmp_path / "sweep", [*grid(), ({LR: 1e-4, PACK: 64, SEED: 0}, FAILED)]))))
    copy = tmp_path / "probe.html"
    copy.write_text(page.replace("<main>", PROBE + "<main>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--virtual-time-budget=3000",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S).group(1))
    seen = json.loads(title)
    assert seen["overflow"] <= 0
    assert seen["lit"] == 1
    assert re.match(r"job \d: lr .*tokens$", seen["tip"], re.S)
    assert seen["first"] == "4"  # the fourth of four ranked settings comes first after two clicks


@pytest.mark.parametrize("keys", [1, 3])
def test_charts_show_what_was_stopped_early(tmp_path, keys):
    stopped = {"rows": [step(1, 3.0), evaluation(1, 3.0)], "state": "interrupted", "pruned": "hopeless"}
    names = (LR, "optimizer.eps", "optimizer.weight_decay")[:keys]
    jobs = [({name: n * 1e-4 for name in names}, run) for n, run in enumerate([finished(2.0), stopped, finished(2.5), stopped], 1)]
    read = page_of(tmp_path, jobs)
    classes = [value for attribute, value in read.attributes if attribute == "class"]
    assert classes.count("point stopped" if keys == 1 else "track stopped") == 2
    assert "Dashed: stopped early" in read.words
    assert "stopped early at 100 tokens" in read.words


def test_a_curve_that_leaves_the_chart_ends_at_its_frame(tmp_path):
    """An explosion is not drawn on as a plateau, and its cross stands where it was last seen."""
    exploded = {"rows": [step(1, 3.0), step(2, 500.0), step(3, 900.0)], "state": "failed"}
    page = sweep_page(Findings(read_sweep(make_sweep(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 1.0}, exploded)]))))
    (path,) = re.findall(r'failed" data-job="1"><title>[^<]*</title><path d="([^"]*)" class="line"', page)
    points = [tuple(map(float, point.split(","))) for point in re.findall(r"[\d.]+,[\d.]+", path)]
    assert [y for _, y in points].count(14.0) == 1
    assert points[-1][0] < 230  # of 560: between the first step and the second, of three


def test_a_chart_is_not_blown_up_and_does_not_stand_alone(tmp_path):
    for name in ("three keys", "only seeds"):
        page = sweep_page(Findings(read_sweep(make_sweep(tmp_path / name, STATES[name]))))
        losses = page.index('aria-label="training loss of all jobs over tokens"')
        assert 'style="max-width:728px"' in page[losses - 120 : losses]
        assert page.rindex('<div class="pair">', 0, losses) > page.rindex("</section>", 0, page.rindex("<section", 0, losses))


def test_the_metric_stands_right_after_the_rank(tmp_path):
    """So that a narrow page shows it."""
    words = page_of(tmp_path, STATES["three keys"]).words
    assert re.search(r"lower is better\. +eval/loss (lr|eps|pack_max_length) ", words)


@pytest.mark.parametrize(("states", "sign"), [(["interrupted"], "× interrupted"), (["failed", "interrupted"], "× failed or interrupted")])
def test_the_legend_tells_how_curves_ended(tmp_path, states, sign):
    ended = [({LR: 1e-3 * n}, {"rows": [step(1, 3.0)], "state": state}) for n, state in enumerate(states, 1)]
    words = page_of(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, finished(2.5)), *ended]).words
    assert f"{sign} ●" in words


def test_the_best_has_one_colour_in_all_charts(tmp_path):
    page = sweep_page(Findings(read_sweep(make_sweep(tmp_path, STATES["three keys"]))))
    assert "the best in orange" in page
    assert 'class="series k1 strong" data-job="0"' in page
    assert page.count('class="series km"') == 6
