"""Muon beside torch's own, which knows single matrices and bfloat16 alone."""

import pytest
import torch

from xtuner_hydra.optim.muon import Muon, orthogonalise

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 5)]


def train(optimizer, parameters, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize(("dtype", "apart"), [(torch.bfloat16, 1e-2), (torch.float32, 3e-2)])
def test_steps_are_torchs(dtype, apart):
    """Up to the rounding of torch's bfloat16; an update has values about 0.2 lr, four of them 0.08."""
    options = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9}
    ours, theirs = matrices(), matrices()
    train(Muon(ours, **options, dtype=dtype), ours)
    train(torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"), theirs)
    for one, other, start in zip(ours, theirs, matrices(), strict=True):
        assert (one - other).abs().max() < apart
        assert (one - start).abs().max() > 0.1


def test_a_stack_is_trained_as_its_matrices_are():
    """As a mixture's experts are."""
    stack = torch.nn.Parameter(torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "dtype": torch.float32}
    train(Muon([stack], **options), [stack])
    generator = torch.Generator().manual_seed(1)
    optimizer = Muon(alone, **options)
    for _ in range(4):
        for parameter, gradient in zip(alone, torch.randn(3, 4, 6, generator=generator), strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert torch.allclose(stack, torch.stack([matrix.detach() for matrix in alone]), atol=1e-5)


def test_an_experts_gate_and_up_are_matrices_of_their_own():
    """However different their gradients are."""
    fused = torch.nn.Parameter(torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)))
    alone = [torch.nn.Parameter(part.clone()) for part in fused.detach().chunk(2, dim=1)]
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "dtype": torch.float32}
    fused.grad = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1))
    fused.grad[:, 4:] /= 10
    for part, gradient in zip(alone, fused.grad.chunk(2, dim=1), strict=True):
        part.grad = gradient.clone()
    Muon([{"params": [fused], "stacked": 2}], **options).step()
    Muon(alone, **options).step()
    assert torch.allclose(fused, torch.cat([part.detach() for part in alone], dim=1), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5), (3, 6, 4)])
def test_singular_vectors_stay_and_values_come_near_one(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.mT @ orthogonalise(matrix, torch.float64) @ right.mT  # diagonal: its singular values
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(turned, torch.diag_embed(values), atol=1e-8)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_gradient_of_zero_changes_nothing():
    assert not orthogonalise(torch.zeros(3, 4), torch.float32).any()


def test_a_parameter_without_a_gradient_is_left_alone():
    used, unused = matrices()[:2]
    used.grad = torch.ones_like(used)
    before = unused.detach().clone()
    Muon([used, unused], lr=0.1, weight_decay=0.5, momentum=0.9, dtype=torch.float32).step()
    assert torch.equal(unused, before)
