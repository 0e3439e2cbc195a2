"""Norms and biases are not decayed, unless asked for."""

import torch

from xtuner_hydra.config.schema import OptimizerConfig
from xtuner_hydra.optim.optimizers import build_optimizer, parameter_groups


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm = torch.nn.Linear(3, 3, bias=True), torch.nn.LayerNorm(3)


def test_only_matrices_are_decayed():
    model = Small()
    decayed, kept = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert (decayed["weight_decay"], [id(p) for p in decayed["params"]]) == (0.1, [id(model.proj.weight)])
    assert (kept["weight_decay"], len(kept["params"])) == (0.0, 3)


def test_decay_all_puts_everything_in_one_group():
    (group,) = parameter_groups(Small(), OptimizerConfig(decay_all=True))
    assert len(group["params"]) == 4


def test_a_step_is_adamws_formula():
    """First step from zero moments: w - lr * (g / (|g| + eps) + wd * w) (Loshchilov & Hutter 2019, algorithm 2)."""
    model = Small()
    before, gradient = model.proj.weight.detach().clone(), torch.randn(3, 3)
    model.proj.weight.grad = gradient.clone()
    build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5)).step()
    expected = before - 0.1 * (gradient / (gradient.abs() + 1e-8) + 0.5 * before)
    assert torch.allclose(model.proj.weight, expected, atol=1e-5)
