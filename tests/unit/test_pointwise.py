"""Compiled and eager must agree, for all that is marked and for lengths that were not compiled for."""

import pytest
import torch

from xtuner_hydra.loss import linear_cross_entropy
from xtuner_hydra.model.layers import RMSNorm, _Rotate, rotary, swiglu
from xtuner_hydra.pointwise import _ALL, compile_pointwise


@pytest.fixture(autouse=True)
def eager_again():
    yield
    compile_pointwise(False)
    torch.compiler.reset()


def everything(tokens, dtype):
    """A small network of all that is marked; (loss, its gradients)."""
    generator = torch.Generator().manual_seed(tokens)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, weight, head = leaf(tokens, 4, 16), leaf(16), leaf(300, 64)
    norm = RMSNorm(16, 1e-6)
    norm.weight = torch.nn.Parameter(weight)
    rotated = _Rotate.apply(norm(x), *rotary(torch.arange(tokens), 16, 1e4, dtype)).flatten(1)
    loss = linear_cross_entropy(swiglu(rotated, rotated.flip(0)), head, torch.arange(tokens) % 300, chunk=64 * tokens)
    return loss.detach(), *torch.autograd.grad(loss, (x, norm.weight, head))


@pytest.mark.parametrize(("dtype", "tolerance"), [pytest.param(torch.float32, 1e-5, marks=pytest.mark.faults), (torch.bfloat16, 2e-2)])
def test_compiled_agrees_with_eager(dtype, tolerance):
    lengths = (37, 12, 50)
    eager = [everything(tokens, dtype) for tokens in lengths]
    compile_pointwise(True)
    for tokens, expected in zip(lengths, eager, strict=True):
        for one, other in zip(everything(tokens, dtype), expected, strict=True):
            assert (one - other).norm() <= tolerance * other.norm()


def test_what_is_marked_is_compiled_and_can_be_eager_again():
    assert len(_ALL) == 7
    compile_pointwise(True)
    assert all(one._now is not one.eager for one in _ALL)
    compile_pointwise(False)
    assert all(one._now is one.eager for one in _ALL)


def test_one_graph_serves_all_lengths():
    """A function that broke into pieces, or was compiled anew for every length, would cost more than it saves."""
    torch._dynamo.utils.counters.clear()
    compile_pointwise(True)
    for tokens in (37, 12, 50, 64):
        everything(tokens, torch.bfloat16)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # the norm has a shape and the loss a narrower last slice; what more there were would be one a length
    assert counters["stats"]["unique_graphs"] <= len(_ALL) + 2
