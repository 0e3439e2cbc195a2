"""Which rank a process is."""

import pytest

from xtuner_hydra.machine import own_rank, started_by_torchrun


@pytest.mark.parametrize(
    ("environment", "launched", "rank"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}, True, 3),
        ({"RANK": "3"}, False, 0),  # as some schedulers set it for their own ends
        ({}, False, 0),
    ],
)
def test_a_rank_takes_a_launcher(monkeypatch, environment, launched, rank):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (started_by_torchrun(), own_rank()) == (launched, rank)
