"""Norms and biases are not decayed, unless asked for; each optimizer gets the parameters that it is for."""

import pytest
import torch

from xtuner_hydra.config.schema import MoEConfig, OptimizerConfig
from xtuner_hydra.model.experts import Experts
from xtuner_hydra.optim.muon import Muon
from xtuner_hydra.optim.optimizers import build_optimizers


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lm_head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        self.proj, self.norm = torch.nn.Linear(3, 3, bias=True), torch.nn.LayerNorm(3)


def optimizers_of(model, **config):
    return build_optimizers(model, OptimizerConfig(**config), torch.float32)


def names(model, parameters):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_matrices_are_decayed(name):
    model = Small()
    (optimizer,) = optimizers_of(model, name=name, weight_decay=0.1)
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert names(model, decayed["params"]) == {"embed_tokens.weight", "lm_head.weight", "proj.weight"}
    assert names(model, kept["params"]) == {"proj.bias", "norm.weight", "norm.bias"}


def test_decay_all_puts_everything_in_one_group():
    (optimizer,) = optimizers_of(Small(), decay_all=True)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 6


def test_frozen_parameters_have_no_optimizer():
    model = Small().requires_grad_(False)
    model.proj.weight.requires_grad_(True)
    (optimizer,) = optimizers_of(model, name="muon")
    assert isinstance(optimizer, Muon)
    assert names(model, optimizer.param_groups[0]["params"]) == {"proj.weight"}


def test_muon_takes_the_matrices_between_hidden_states_and_adamw_the_rest():
    model = Small()
    muon, adamw = optimizers_of(model, name="muon")
    assert names(model, (one for group in muon.param_groups for one in group["params"])) == {"proj.weight"}
    rest = {"embed_tokens.weight", "lm_head.weight", "proj.bias", "norm.weight", "norm.bias"}
    assert names(model, (one for group in adamw.param_groups for one in group["params"])) == rest


def first_step(**config):
    """(weight before, its gradient, weight after) one step from zero state."""
    torch.manual_seed(0)
    model = Small()
    before, gradient = model.proj.weight.detach().clone(), torch.randn(3, 3)
    model.proj.weight.grad = gradient.clone()
    for optimizer in optimizers_of(model, **config):
        optimizer.step()
    return before, gradient, model.proj.weight.detach()


def test_a_step_is_adamws_formula():
    """First step from zero moments: w - lr * (g / (|g| + eps) + wd * w) (Loshchilov & Hutter 2019, algorithm 2)."""
    before, gradient, after = first_step(lr=0.1, weight_decay=0.5)
    assert torch.allclose(after, before - 0.1 * (gradient / (gradient.abs() + 1e-8) + 0.5 * before), atol=1e-5)


def test_a_step_of_sgd_looks_ahead():
    """First step of Nesterov's momentum: the buffer is the gradient, so the step is (1 + momentum) of it."""
    before, gradient, after = first_step(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.0)
    assert torch.allclose(after, before - 0.1 * 1.5 * gradient, atol=1e-6)


def test_sgd_adds_the_decay_to_the_gradient():
    before, gradient, after = first_step(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.5)
    assert torch.allclose(after, before - 0.1 * 1.5 * (gradient + 0.5 * before), atol=1e-6)


def test_muon_knows_the_two_matrices_in_an_experts_one():
    model = torch.nn.Module()
    model.experts = Experts(6, MoEConfig(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=4))
    (muon,) = optimizers_of(model, name="muon")
    stacked = {name: group["stacked"] for group in muon.param_groups for name in names(model, group["params"])}
    assert stacked == {"experts.gate_up_proj": 2, "experts.down_proj": 1}
