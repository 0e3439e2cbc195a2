"""Event files, read back by TensorBoard."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xtuner_hydra.tracking.tensorboard import TensorBoardTracker


def write(directory, start_step, losses):
    tracker = TensorBoardTracker(directory, start_step)
    for step, loss in losses.items():
        tracker.log({"train/step": step, "train/loss": loss, "throughput/mfu": None})
    tracker.finish("completed", 0)


def scalars(directory):
    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_its_own_reader_finds_every_value_by_step(tmp_path):
    write(tmp_path / "tb", 0, {1: 2.0, 2: 1.5})
    assert scalars(tmp_path / "tb") == {"train/loss": {1: 2.0, 2: 1.5}}


@pytest.mark.parametrize("later", [{}, {3: 1.0, 4: 0.5}, {4: 0.5}], ids=["nothing", "every step", "every second step"])
def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path, later):
    write(tmp_path / "tb", 0, {1: 2.0, 2: 1.5, 3: 9.0})
    write(tmp_path / "tb", 2, later)
    assert scalars(tmp_path / "tb") == {"train/loss": {1: 2.0, 2: 1.5, **later}}
