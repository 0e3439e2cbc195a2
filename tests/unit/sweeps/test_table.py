"""The table of a sweep tells what is in the directories of its jobs."""

import csv
import random

import pytest

from xtuner_hydra import run_dir
from xtuner_hydra.files import write_text
from xtuner_hydra.sweeps import table


def job(directory, name, state="completed", *, overrides=("optimizer.lr=1e-4",), error=None, **metrics):
    path = directory / name
    path.mkdir()
    write_text(path / "overrides.yaml", "".join(f'- "{override}"\n' for override in overrides))
    run_dir.write_status(path, state, step=7, error=error, metrics={key.replace("__", "/"): value for key, value in metrics.items()})


@pytest.fixture
def sweep(tmp_path):
    job(tmp_path, "0_lr0.1", train__loss=1.25, eval__loss=2.5, throughput__e2e_tgs=100.26)
    job(tmp_path, "1_lr1", "failed", error="rank 0: step 2: NaN | stop\nmore", train__loss=9.0)
    job(tmp_path, "2_lr0.01", train__loss=1.5, eval__loss=2.0 + 1e-9, throughput__e2e_tgs=99.0)
    job(tmp_path, "10_lr0.001", train__loss=3.0, eval__loss=3.0)
    return tmp_path


def test_the_file_has_full_precision_in_the_order_of_the_jobs(sweep):
    table.write(sweep)
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    assert [row["job"] for row in rows] == ["0_lr0.1", "1_lr1", "2_lr0.01", "10_lr0.001"]
    assert float(rows[2]["eval/loss"]) == 2.0 + 1e-9
    assert rows[1] == rows[1] | {"state": "failed", "steps": "7", "eval/loss": "", "overrides": "optimizer.lr=1e-4"}
    assert rows[1]["error"] == "rank 0: step 2: NaN | stop\nmore"


def test_the_best_completed_job_is_marked(sweep):
    rows = table.write(sweep)
    assert table.best(rows).job == "2_lr0.01"
    assert "| 2 * |" in (sweep / "sweep.md").read_text()
    (marked,) = [line for line in table.text(rows).splitlines() if "*" in line]
    assert marked.startswith("2 *")
    assert "2.0000" in marked


def test_more_than_ten_jobs_stand_in_the_order_of_their_numbers(tmp_path):
    numbers = list(range(23))
    for number in random.Random(0).sample(numbers, len(numbers)):
        job(tmp_path, f"{number}_lr{number}", train__loss=30.0 - number)
    rows = table.write(tmp_path)
    assert [row.job for row in rows] == [f"{number}_lr{number}" for number in numbers]
    first = [line.split("|")[1].strip() for line in (tmp_path / "sweep.md").read_text().splitlines() if line.startswith("| ")]
    assert first == ["", *map(str, numbers[:-1]), "22 *"]
    assert [line.split()[0] for line in table.text(rows).splitlines()[1:]] == list(map(str, numbers))


def test_a_job_without_evaluation_is_not_the_best_where_others_were_evaluated(tmp_path):
    job(tmp_path, "0_a", train__loss=0.1)
    job(tmp_path, "1_b", train__loss=2.0, eval__loss=2.0)
    job(tmp_path, "2_c", train__loss=1.0, eval__loss=None)
    rows = table.write(tmp_path)
    assert table.best(rows).job == "1_b"
    assert [row["eval/loss"] for row in csv.DictReader((tmp_path / "sweep.csv").open())] == ["", "2.0", ""]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    job(tmp_path, "0_a", train__loss=1.0, eval__loss=float("nan"))
    job(tmp_path, "1_b", train__loss=2.0, eval__loss=2.0)
    assert table.best(table.write(tmp_path)).job == "1_b"


def test_what_is_no_job_is_no_row(tmp_path):
    job(tmp_path, "0_a", train__loss=1.0)
    (tmp_path / "1_never_started").mkdir()
    (tmp_path / "multirun.yaml").touch()
    assert [row.job for row in table.read(tmp_path)] == ["0_a"]


def test_text_stands_in_columns_and_long_errors_are_cut(sweep):
    job(sweep, "11_lr2", "failed", error="x" * 500)
    lines = table.text(table.read(sweep)).splitlines()
    column = lines[0].index("state")
    assert {line[column:].split()[0] for line in lines} == {"state", "completed", "failed"}
    assert "x" * 100 in lines[-1]
    assert "x" * 200 not in lines[-1]


def test_markdown_keeps_its_columns(sweep):
    table.write(sweep)
    lines = [line for line in (sweep / "sweep.md").read_text().splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_without_evaluations_training_loss_decides(tmp_path):
    job(tmp_path, "0_a", train__loss=2.0)
    job(tmp_path, "1_b", train__loss=1.0)
    job(tmp_path, "2_c", "interrupted", train__loss=0.1)
    assert table.best(table.read(tmp_path)).job == "1_b"


def test_a_job_that_was_refused_before_it_had_files_is_a_row(tmp_path):
    (tmp_path / "0_a").mkdir()
    run_dir.write_status(tmp_path / "0_a", "failed", exit_code=2, error="data.path: gone", overrides=["optimizer.lr=1"])
    (row,) = table.read(tmp_path)
    assert (row.overrides, row.state, row.error) == (["optimizer.lr=1"], "failed", "data.path: gone")
    assert table.best([row]) is None
