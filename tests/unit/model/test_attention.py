"""Packed attention against the formula, written out with a mask."""

import pytest
import torch

from xtuner_hydra.model.attention import attention


def formula(q, k, v, lengths, window=None):
    """softmax over what a token may see, in fp64, key-value heads repeated."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (owner[:, None] == owner) & torch.ones(len(q), len(q)).tril().bool()
    visible &= torch.arange(len(q))[:, None] - torch.arange(len(q)) < (window or len(q))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 7, 8, 49, 50])
@pytest.mark.parametrize("lengths", [[1], [50], [3, 1, 46], [7] * 7])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 10), (5, 1, 6)])
def test_output_and_gradients_follow_the_formula(lengths, window, heads, kv_heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    exact = [x.requires_grad_() for x in (q, k, v)]
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    out, expected = attention(*single, cu_seqlens, max(lengths), window), formula(*exact, lengths, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out.backward(grad.float())
    expected.backward(grad)
    for ours, theirs in zip(single, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
