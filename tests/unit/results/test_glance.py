"""A glance at a run agrees with reading it all, and a damaged directory is an answer."""

import json

import pytest
from run_dirs import make_run

from xtuner_hydra import run_dir
from xtuner_hydra.results.glance import glance, progress
from xtuner_hydra.results.run import find_runs, load_run


@pytest.mark.parametrize("state", ["running", "completed", "failed", "interrupted"])
def test_a_glance_sees_what_reading_all_sees(tmp_path, state):
    directory = make_run(tmp_path / "run", state=state, lr=2e-4, losses=[3.0, None, 2.5])
    seen, run = glance(directory), load_run(directory)
    assert (seen.state, seen.step, seen.total_steps, seen.overrides) == (run.state, run.step, run.total_steps, run.overrides)
    assert seen.metrics == run.final
    assert seen.values == run.values


def test_only_the_end_of_long_metrics_is_read(tmp_path):
    directory = make_run(tmp_path / "run", state="running", losses=[1.0])
    rows = [json.dumps({"train/step": step, "train/loss": 1 / step, "pad": "x" * 1000}) for step in range(1, 2001)]
    (directory / "metrics.jsonl").write_text("\n".join(rows) + '\n{"train/step": 20')
    assert glance(directory).metrics["train/loss"] == 1 / 2000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", b'{"state": "run'),
        ("status.json", b"[1]"),
        ("config.yaml", b"optimizer: [1"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("config.yaml", b""),
        ("overrides.yaml", b"- nonsense\n"),
        ("config.yaml", None),
        ("status.json", None),
        ("overrides.yaml", None),
    ],
)
def test_a_damaged_run_says_which_file_is_damaged(tmp_path, name, content):
    directory = make_run(tmp_path / "run")
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    assert list(find_runs([tmp_path], damaged=True)) == [directory]
    seen = glance(directory)
    assert seen.state == "damaged"
    assert seen.damage


def test_damaged_metrics_of_a_killed_run_are_no_traceback(tmp_path):
    directory = make_run(tmp_path / "run", state="running")
    (directory / "metrics.jsonl").write_bytes(b"\x00\x00\n")
    assert glance(directory).state == "damaged"


def test_a_job_that_was_refused_has_a_status_alone(tmp_path):
    (tmp_path / "0_a").mkdir()
    status = {"state": "failed", "exit_code": 2, "error": "data.path: gone", "overrides": ["optimizer.lr=1"]}
    (tmp_path / "0_a" / "status.json").write_text(json.dumps(status))
    assert list(find_runs([tmp_path])) == []
    (directory,) = find_runs([tmp_path], damaged=True)
    seen = glance(directory)
    assert (seen.state, seen.overrides, seen.error) == ("failed", ["optimizer.lr=1"], "data.path: gone")


def test_a_config_yaml_alone_is_nobodys_run(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert list(find_runs([tmp_path], damaged=True)) == []


def test_the_progress_of_a_run_that_cannot_tell_it_is_that_of_its_rows(tmp_path):
    run_dir.write_status(tmp_path, "running", step=4, total_steps=9)
    assert progress(tmp_path) == {"step": 4, "total_steps": 9}
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 5, "train/loss": 2.0}\n{"train/step": 6, "train/loss": null}\n{"train/st')
    # the loss is not what it was before it was lost
    assert progress(tmp_path) == {"step": 6, "total_steps": 9, "metrics": {"train/step": 6}}
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    assert progress(tmp_path) == {"step": 4, "total_steps": 9}
