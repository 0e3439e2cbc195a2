"""metrics.jsonl: nothing is lost, nothing is written twice, and it is always JSON."""

import json
from pathlib import Path

import pytest

from xtuner_hydra.errors import TrainingError
from xtuner_hydra.tracking.jsonl import JsonlTracker, SampleTracker, Tail, read


def test_rows_keep_full_precision_and_can_be_read_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"train/step": 1, "train/loss": 0.1 + 0.2, "train/lr": 6e-5 / 7}
    tracker = JsonlTracker(path, 0)
    tracker.log(row)
    assert json.loads(path.read_text()) == row  # before the file is closed
    tracker.finish("completed", 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_hold_is_null(tmp_path, value):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", 0)
    tracker.log({"train/step": 1, "train/loss": value})
    assert read(tmp_path / "metrics.jsonl") == [{"train/step": 1, "train/loss": None}]


def test_a_resumed_run_drops_later_rows_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"train/step": {step}}}\n' for step in (1, 2, 3)) + '{"train/st')
    JsonlTracker(path, 2).log({"train/step": 3})
    assert [row["train/step"] for row in read(path)] == [1, 2, 3]


@pytest.mark.parametrize("damaged", [b"\n", b"garbage\n", b"\0\0\0\0\n", b"\xff\xfe\n", b"[1]\n", b"{}\n"])
def test_a_resumed_run_leaves_out_a_damaged_line(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"train/step": 1}\n' + damaged + b'{"train/step": 2}\n{"train/step": 3}\n')
    JsonlTracker(path, 2).finish("completed", 0)
    assert read(path) == [{"train/step": 1}, {"train/step": 2}]


def test_what_a_resumed_run_keeps_stays_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"train/step": 1, "train/loss": 0.1 + 0.2}, {"train/step": 2, "train/loss": None}, {"train/step": 2, "eval/loss": 1e-300}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    JsonlTracker(path, 2).finish("completed", 0)
    assert path.read_bytes() == before


def test_a_step_that_was_saved_before_its_evaluation_keeps_its_own_row_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"train/step": 1, "eval/loss": 3.0}, {"train/step": 2, "train/loss": 2.0}, {"train/step": 2, "eval/loss": 2.5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    JsonlTracker(path, 2, finished=False).finish("completed", 0)
    assert read(path) == rows[:2]


def test_a_new_run_keeps_no_row_of_an_earlier_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/step": 1}\n')
    JsonlTracker(path, 0).finish("completed", 0)
    assert path.read_text() == ""


def test_a_full_disk_stops_the_run(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", 0)
    tracker.file.close()
    tracker.file = Path("/dev/full").open("a")  # noqa: SIM115 - takes no byte, not even when it is closed
    with pytest.raises(TrainingError, match="No space left"):
        tracker.log({"train/step": 1})
    with pytest.raises(OSError, match="No space left"):
        tracker.finish("failed", 1)


def test_a_follower_hears_each_row_and_begins_again_with_a_file_that_a_resumed_run_has_cut_and_regrown(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    tracker = JsonlTracker(path, 0)
    tracker.log({"train/step": 1, "train/loss": 2.5})
    tracker.file.write("\0\0\0\n")  # what a loss of power has left, before a resumed job leaves it out
    tracker.log({"train/step": 2, "train/loss": 2.25})
    assert [row["train/step"] for row in tail.read()] == [1, 2]
    tracker.file.write('{"train/step": 3')
    tracker.file.flush()
    assert tail.read() == []
    tracker.finish("interrupted", 130)
    resumed = JsonlTracker(path, 1)
    for step in (2, 3, 4):  # longer rows than the first time: the old place would be in the middle of one
        resumed.log({"train/step": step, "train/loss": 1.0, "train/grad_norm": 0.123456789})
    assert [row["train/step"] for row in tail.read()] == [1, 2, 3, 4]
    assert tail.read() == []


def test_no_file_has_no_rows(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []


def test_samples_have_a_file_of_their_own_that_a_resumed_run_continues(tmp_path):
    path = tmp_path / "samples.jsonl"
    samples = [{"train/step": step, "prompt": "„why“?", "text": f"\u2028{step}\n"} for step in (1, 2, 3)]
    tracker = SampleTracker(path, 0)
    tracker.log({"train/step": 1, "train/loss": 1.0})
    tracker.show(samples)
    tracker.finish("completed", 0)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == samples
    SampleTracker(path, 1).show([samples[2]])
    assert read(path) == [samples[0], samples[2]]
