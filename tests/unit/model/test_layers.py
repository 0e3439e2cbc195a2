"""Hand-written backward passes against autograd and finite differences."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from xtuner_hydra.model.layers import MLP, Embedding, RMSNorm, _Rotate, _SwiGLU, rotary


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(7, 12), (5, 3, 8), (0, 12)])
def test_rms_norm_is_that_of_torch(shape):
    norm = RMSNorm(shape[-1], 1e-3)
    norm.weight.data.normal_()
    x = normal(*shape)
    grad = torch.randn(shape)
    out, expected = norm(x), F.rms_norm(x, shape[-1:], norm.weight, 1e-3)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, (x, norm.weight), grad), torch.autograd.grad(expected, (x, norm.weight), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rms_norm_of_bf16_takes_its_statistics_in_fp32():
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    x[0, 0] = 300.0
    norm = RMSNorm(4096, 1e-6).to(torch.bfloat16)
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(norm(x), exact.bfloat16())


def test_rotation_is_multiplication_by_complex_numbers():
    positions = torch.tensor([0, 1, 2, 0, 1, 300])
    x = normal(6, 2, 8)
    cos, sin = rotary(positions, 8, 100.0, torch.float32)
    frequencies = 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turn = torch.exp(1j * positions[:, None, None] * frequencies)
    turned = torch.complex(*x.double().chunk(2, -1)) * turn
    out = _Rotate.apply(x, cos, sin)
    torch.testing.assert_close(out.double(), torch.cat([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-5)
    grad = torch.randn(6, 2, 8)
    (ours,) = torch.autograd.grad(out, x, grad)
    (theirs,) = torch.autograd.grad(torch.cat([turned.real, turned.imag], -1).float(), x, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_swiglu_and_its_gradient_are_autograds():
    gate, up, grad = normal(6, 10, seed=1), normal(6, 10, seed=2), torch.randn(6, 10)
    ours, theirs = _SwiGLU.apply(gate, up), F.silu(gate) * up
    assert torch.equal(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (gate, up), grad), torch.autograd.grad(theirs, (gate, up), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_mlp_is_autograds_and_keeps_two_inner_states_a_token(frozen):
    config = SimpleNamespace(hidden_size=8, intermediate_size=40)
    mlp, x, grad = MLP(config), normal(6, 8), torch.randn(6, 8)
    mlp.down_proj.weight.requires_grad_(not frozen)
    inputs = [x, *(one for one in mlp.parameters() if one.requires_grad)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours = mlp(x)
    theirs = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.equal(ours, theirs)
    assert sum(tensor.shape == (6, 40) for tensor in kept) == 2
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ids", [[4, 4, 0, 9, 4, 0, 2], [3]])
def test_embedding_and_its_gradient_are_those_of_torch(ids):
    table = Embedding(10, 6)
    grad = torch.randn(len(ids), 6)
    ours, theirs = table(torch.tensor(ids)), F.embedding(torch.tensor(ids), table.weight)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, table.weight, grad), torch.autograd.grad(theirs, table.weight, grad))
