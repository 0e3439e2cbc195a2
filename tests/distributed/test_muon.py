"""Muon on 2 gloo ranks updates as one process does: stacks of matrices are dealt out whole, a single matrix by its rows."""

import pytest
import torch
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from xtuner_hydra.optim.muon import Muon

CASES = {"as many experts each": (4, 6, 5), "uneven experts": (3, 6, 5), "a rank without one": (1, 6, 5), "one matrix": (7, 5)}
OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "dtype": torch.float32}


def train(shape, place):
    """A parameter after two steps, with `place` for where its values and gradients lie."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator) for _ in range(3))
    parameter = torch.nn.Parameter(place(start))
    optimizer = Muon([{"params": [parameter], "stacked": 2 if len(shape) > 2 else 1}], **OPTIONS)
    for gradient in gradients:
        parameter.grad = place(gradient)
        optimizer.step()
    return parameter.detach()


def train_on_a_rank():
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    trained = {name: train(shape, lambda whole: distribute_tensor(whole, mesh, [Shard(0)])).full_tensor() for name, shape in CASES.items()}
    torch.distributed.destroy_process_group()
    return trained


@pytest.fixture(scope="module")
def by_rank():
    return run_on_ranks(train_on_a_rank, 2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_update_as_one_process_does(by_rank, case):
    expected = train(CASES[case], torch.clone)
    for trained in by_rank:
        torch.testing.assert_close(trained[case], expected, atol=1e-5, rtol=1e-5)
