"""A run that does not fit is told of before it starts."""

from types import SimpleNamespace

import pytest

from xtuner_hydra import room
from xtuner_hydra.config.schema import CheckpointConfig, Config, DataConfig
from xtuner_hydra.cost import Sizes
from xtuner_hydra.errors import RefusedError

SIZES = Sizes(total=100, trainable=100, moments=200, exported=100)
"""Checkpoints of 1200 bytes, exports of 400; 1600 bytes in memory."""


def free(monkeypatch, number):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=number, total=10_000))


def config(**checkpoint):
    return Config(data=DataConfig(path="unused"), checkpoint=CheckpointConfig(**checkpoint))


def test_a_disk_without_room_for_one_checkpoint_is_refused(monkeypatch, tmp_path):
    free(monkeypatch, 1199)
    with pytest.raises(RefusedError, match=r"a checkpoint takes 1\.2 KiB, and only 1\.2 KiB are free there"):
        room.refuse_full_disk(config(), tmp_path / "not" / "there", SIZES, 10)
    room.refuse_full_disk(config(interval=None), tmp_path, SIZES, 10)


@pytest.mark.parametrize(("bytes_free", "warned"), [(1200, True), (1599, True), (1600, False)])
def test_a_disk_that_will_be_full_at_the_end_is_a_warning(monkeypatch, tmp_path, warnings, bytes_free, warned):
    free(monkeypatch, bytes_free)
    room.refuse_full_disk(config(), tmp_path, SIZES, 10)
    assert bool(warnings()) == warned


@pytest.mark.parametrize(
    ("memory", "shards", "here", "warned"), [(1600, 1, 1, False), (1599, 1, 1, True), (1599, 2, 2, True), (800, 2, 1, False)]
)
def test_weights_that_exceed_the_memory_are_a_warning(monkeypatch, warnings, memory, shards, here, warned):
    monkeypatch.setattr(room, "memory_gb", lambda: memory / 2**30)
    room.warn_of_memory(SIZES, shards, here)
    assert bool(warnings()) == warned
