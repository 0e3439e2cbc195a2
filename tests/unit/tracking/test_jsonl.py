import json
from pathlib import Path

import pytest

from xtuner_hydra.errors import TrainingError
from xtuner_hydra.tracking.jsonl import JsonlTracker, read


def test_rows_keep_full_precision_and_can_be_read_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"train/step": 1, "train/loss": 0.1 + 0.2, "train/lr": 6e-5 / 7}
    tracker = JsonlTracker(path, 0)
    tracker.log(row)
    assert json.loads(path.read_text()) == row
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


def test_a_full_disk_stops_the_run():
    tracker = JsonlTracker(Path("/dev/full"), 0)
    with pytest.raises(TrainingError, match="No space left"):
        tracker.log({"train/step": 1})


def test_no_file_has_no_rows(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []
