"""Joining and leaving the process group."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import TINY, run_on_ranks

from xtuner_hydra.config.schema import Config, DataConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.parallel.runtime import runtime


def config(**parallelism):
    return Config(
        model=TINY,
        data=DataConfig(path="unused"),
        parallelism=ParallelismConfig(**parallelism),
        trainer=TrainerConfig(device="cpu"),
    )


def timeouts(replicate):
    with runtime(config(dp_replicate=replicate, timeout=4000.0)) as place:
        groups = [*place.mesh.get_all_groups(), dist.group.WORLD]
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.parametrize("replicate", [1, 2])
def test_every_group_has_the_patience_that_is_asked_for(replicate):
    assert run_on_ranks(timeouts, 2, replicate) == [[timedelta(seconds=6060)] * (1 + replicate)] * 2  # with one copy, no group for it


def is_left(fails):
    try:
        with runtime(config()):
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    return not dist.is_initialized()


@pytest.mark.parametrize(("ranks", "fails", "left"), [(1, False, True), (1, True, True), (2, False, True), (2, True, False)])
def test_a_failed_rank_does_not_wait_for_the_others_to_leave_with_it(ranks, fails, left):
    assert run_on_ranks(is_left, ranks, fails) == [left] * ranks
