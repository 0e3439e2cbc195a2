"""Experts: nothing is dropped, both products are the same, and the load-balancing loss is that of transformers."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from xtuner_hydra.config.schema import MoEConfig
from xtuner_hydra.model.experts import MoE, grouped, load_balancing_loss, one_by_one


def rows_of(counts, width, dtype, seed=0):
    torch.manual_seed(seed)
    return torch.randn(int(counts.sum()), width, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 0, 9], [1, 1, 1, 1]])
def test_one_grouped_product_is_the_product_of_each_expert(counts, dtype):
    """The kernel for CUDA has a plain implementation on a CPU, by which its arguments are checked."""
    counts = torch.tensor(counts, dtype=torch.float32)
    inputs = [rows_of(counts, 16, dtype).requires_grad_() for _ in range(2)]
    weights = [rows_of(torch.tensor([4 * 24]), 16, dtype, 1).view(4, 24, 16).requires_grad_() for _ in range(2)]
    grad = rows_of(counts, 24, dtype, 2)
    for product, rows, weight in zip((grouped, one_by_one), inputs, weights, strict=True):
        out = product(rows, weight, counts)
        start = 0
        for expert, count in enumerate(counts.int().tolist()):
            part = rows[start : start + count].double() @ weight[expert].double().T
            torch.testing.assert_close(out[start : start + count].double(), part, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 0.05)
            start += count
        out.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-2, atol=1e-2)
    assert not weights[1].grad[counts == 0].any()  # there, and zero


@pytest.mark.parametrize("normalised", [False, True])
def test_every_token_gets_all_its_experts_however_uneven_the_load(normalised):
    """The formula, token by token, with a router that sends nearly everything to one expert."""
    config = MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, norm_topk_prob=normalised)
    torch.manual_seed(0)
    moe = MoE(8, config).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
        moe.gate.weight[3] = 4.0
    x = torch.rand(40, 8, dtype=torch.float64)
    out, routing = moe(x)
    for token, result in zip(x, out, strict=True):
        probabilities = (moe.gate.weight @ token).softmax(0)
        best = probabilities.argsort(descending=True)[:2]
        share = probabilities[best] / (probabilities[best].sum() if normalised else 1)
        expected = torch.zeros(8, dtype=torch.float64)
        for expert, weight in zip(best, share, strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
            expected += weight * (moe.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)  # the router's probabilities are fp32
    assert routing.counts.sum() == 80
    assert routing.counts[3] == 40


def test_the_load_balancing_loss_is_that_of_transformers():
    torch.manual_seed(0)
    logits = torch.randn(3, 50, 7)  # layers, tokens, experts
    probabilities = logits.softmax(-1)
    counts = torch.nn.functional.one_hot(probabilities.topk(2, -1).indices, 7).sum((1, 2)).float()
    expected = load_balancing_loss_func(tuple(logits), 7, 2)
    torch.testing.assert_close(load_balancing_loss(counts, probabilities.sum(1), 2), expected)
    parts = [load_balancing_loss(counts, part.sum(1), 2) for part in probabilities.split([11, 39], 1)]
    torch.testing.assert_close(sum(parts), expected)  # what two ranks hold of it


def test_an_even_load_has_the_least_loss():
    even = load_balancing_loss(torch.full((2, 8), 5.0), torch.full((2, 8), 2.5), 2)
    torch.testing.assert_close(even, torch.tensor(2.0))
