"""A sweep: jobs in processes of their own, one failure does not stop the others, and the table tells the truth."""

import csv

import pytest
from conftest import CommandLine, read_rows, read_status


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three jobs, of which the one with an absurd learning rate fails in training."""
    cli = CommandLine(tmp_path_factory.mktemp("sweep"))
    done = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e30,1e-4", "tracking=none", "hydra.sweep.dir=sweep")
    return done, cli.directory / "sweep", cli


def test_a_failed_job_fails_the_sweep_after_the_others(swept):
    done, directory, _ = swept
    assert done.code == 1, done.text
    jobs = sorted(path.parent for path in directory.glob("*/status.json"))
    assert [read_status(job)["state"] for job in jobs] == ["completed", "failed", "completed"]
    assert [job.name for job in jobs] == ["0_lr0.001", "1_lr1e_30", "2_lr0.0001"]


def test_the_table_is_on_screen_and_in_files_with_the_jobs_own_numbers(swept):
    done, directory, _ = swept
    rows = list(csv.DictReader((directory / "sweep.csv").open()))
    assert [row["state"] for row in rows] == ["completed", "failed", "completed"]
    assert "optimizer.lr=0.001" in rows[0]["overrides"]
    for row in rows[::2]:
        metrics = read_rows(directory / row["job"])
        assert float(row["eval/loss"]) == metrics[-1]["eval/loss"]
        assert float(row["train/loss"]) == metrics[-2]["train/loss"]
    assert "optimizer.nonfinite" in rows[1]["error"]
    best = min(rows[::2], key=lambda row: float(row["eval/loss"]))["job"].split("_")[0]
    assert f"| {best} * |" in (directory / "sweep.md").read_text()
    assert f"\n{best} *" in done.out


def test_jobs_save_nothing_unless_asked(swept):
    _, directory, _ = swept
    assert not list(directory.glob("*/checkpoints"))
    assert not list(directory.glob("*/hf"))


def test_a_taken_sweep_directory_is_refused(swept):
    _, _, cli = swept
    done = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e-4", "hydra.sweep.dir=sweep")
    assert (done.code, "holds a sweep already" in done.err) == (2, True)


def test_a_sweep_over_packing_lengths_shares_one_token_cache(tmp_path):
    cli = CommandLine(tmp_path)
    done = cli(
        "-m",
        "debug=fast",
        "data.pack_max_length=128,256",
        "tracking=none",
        "data.eval_path=null",
        "checkpoint.interval=2",
        "hydra.sweep.dir=sweep",
    )
    assert done.code == 0, done.text
    assert len(list((tmp_path / ".cache").rglob("meta.json"))) == 1
    assert len(list((tmp_path / "sweep").glob("*/checkpoints/step-2"))) == 2
