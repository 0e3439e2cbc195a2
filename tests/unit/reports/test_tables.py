"""The tables of a sweep tell what is in the directories of its jobs."""

import csv
import io
import json

import pytest
from runs import finished, make_sweep, step

from xtuner_hydra.reports import tables
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.results.sweep import read_sweep

LR, SEED = "optimizer.lr", "trainer.seed"
FAILED = {"rows": [step(1, 9.0), step(2, None)], "state": "failed", "error": "rank 0: step 2: NaN | stop <b>\nmore"}


@pytest.fixture
def sweep(tmp_path):
    jobs = [({LR: 0.1}, finished(2.5)), ({LR: 1.0}, FAILED), ({LR: 0.01}, finished(2.0 + 1e-9, 1 / 3)), ({LR: 0.001}, finished(3.0))]
    return make_sweep(tmp_path, jobs)


def read_csv(directory):
    return list(csv.DictReader(io.StringIO(tables.as_csv(Findings(read_sweep(directory))))))


def test_the_first_columns_are_those_that_others_rely_on(sweep):
    header = tables.as_csv(Findings(read_sweep(sweep))).splitlines()[0].split(",")
    assert header[:8] == ["job", "overrides", "state", "steps", "train/loss", "eval/loss", "throughput/e2e_tgs", "error"]
    assert header[8:] == ["rank", LR, "train/total_tokens", "seconds", "memory/max_gb", "signature", "attempts"]


def test_csv_numbers_are_those_of_metrics_jsonl(sweep):
    for row in read_csv(sweep):
        lines = [json.loads(line) for line in (sweep / row["job"] / "metrics.jsonl").read_text().splitlines()]
        last = {name: value for line in lines for name, value in line.items()}
        for name in ("train/loss", "eval/loss", "throughput/e2e_tgs", "train/total_tokens", "memory/max_gb"):
            assert row[name] == (repr(last[name]) if last.get(name) is not None else "")


def test_csv_has_the_jobs_in_their_order_with_state_rank_and_error(sweep):
    rows = read_csv(sweep)
    assert [row["job"] for row in rows] == ["0_job", "1_job", "2_job", "3_job"]
    assert [row["rank"] for row in rows] == ["2", "", "1", "3"]
    assert rows[1] == rows[1] | {"state": "failed", "steps": "2", "overrides": f"debug=fast {LR}=1.0", "error": FAILED["error"], LR: "1.0"}
    assert rows[0]["signature"] == "signature0"


def test_another_metric_has_a_column(tmp_path):
    make_sweep(tmp_path, [({LR: 0.1}, finished(2.5))], metric="eval/perplexity")
    assert read_csv(tmp_path)[0]["eval/perplexity"] == "2.0"


def test_the_best_setting_is_marked(sweep):
    findings = Findings(read_sweep(sweep))
    assert "| 1 * | 0.01 | 2.00 |" in tables.markdown(findings)
    (marked,) = [line for line in tables.text(findings).splitlines() if line.startswith("1 *")]
    assert marked.split()[2:4] == ["0.01", "2.00"]


def test_doubts_come_before_the_ranking_and_failures_have_their_first_line(sweep):
    text = tables.markdown(Findings(read_sweep(sweep)))
    assert 0 < text.index("> **Note**: Of 4 jobs 1 failed") < text.index("| 1 * |")
    assert "- `1_job` failed: rank 0: step 2: NaN \\| stop &lt;b>\n" in text


def test_markdown_tables_keep_their_columns(sweep):
    lines = [line for line in tables.markdown(Findings(read_sweep(sweep))).splitlines() if line.startswith("|")]
    assert len(lines) == 6
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_text_stands_in_columns_and_long_errors_are_cut(tmp_path):
    make_sweep(tmp_path, [({LR: 0.1}, finished(2.5)), ({LR: 1.0}, FAILED | {"error": "x" * 500}), ({LR: 2.0}, None)])
    lines = tables.text(Findings(read_sweep(tmp_path))).splitlines()
    column = lines[0].index("state")
    assert [line[column:] for line in lines[:4]] == ["state", "completed", "failed", "waiting"]
    assert "x" * 100 in lines[5]
    assert "x" * 200 not in lines[5]


def test_seeds_are_averaged_and_counted(tmp_path):
    jobs = [({LR: 0.1, SEED: seed}, finished(2.0 + seed)) for seed in (0, 1)] + [
        ({LR: 0.2, SEED: 0}, finished(4.0)),
        ({LR: 0.2, SEED: 1}, None),
    ]
    table = tables.ranking(Findings(read_sweep(make_sweep(tmp_path, jobs))))
    assert [line[:4] for line in table] == [["", "lr", "eval/loss", "seeds"], ["1 *", "0.1", "2.50 ± 0.71", "2"], ["2", "0.2", "4.00", "1"]]
    assert table[2][-1] == "1 completed, 1 waiting"


def test_a_sweep_that_has_not_begun_is_a_table_too(tmp_path):
    findings = Findings(read_sweep(make_sweep(tmp_path, [({LR: 0.1}, None)])))
    assert "No job has completed yet." in tables.markdown(findings)
    assert "waiting" in tables.text(findings).splitlines()[1]
    assert [row["state"] for row in read_csv(tmp_path)] == ["waiting"]


def test_the_terminal_says_that_a_comparison_is_not_fair(tmp_path):
    for name, steps in (("fair", (3, 3)), ("unfair", (3, 30))):
        jobs = [({"optimizer.lr": lr}, finished(2.0 + lr, steps=number)) for lr, number in zip((1e-4, 2e-4), steps, strict=True)]
        text = tables.text(Findings(read_sweep(make_sweep(tmp_path / name, jobs))))
        assert ("Note: The settings were trained on different numbers of tokens" in text) == (name == "unfair")
