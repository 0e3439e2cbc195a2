"""Mixture of experts: a router sends every token to its k likeliest experts; nothing is dropped, whatever the load.

Tokens are sorted by expert, so that each expert works on adjacent rows: one grouped product on CUDA in bfloat16, elsewhere a loop
over the experts that have rows. A layer's experts are two tensors, as in transformers' memory; the files hold them one by one
(families/qwen3_moe.py).

The load-balancing loss is that of transformers (Switch Transformer, Fedus et al. 2021, equations 4 to 6, with the tokens of all layers in
one pool): E * sum over experts of (tokens sent there, per token) * (mean probability of being sent there). It is not a sum over tokens, so
it depends on which tokens are pooled: here those that all ranks work on at the same time, one micro-batch each. That makes it the same for
any number of ranks and any packing of these tokens; a step of several micro-batches takes their mean, weighted by their tokens, as the counts
of a later one are not known when an earlier one's gradient is computed. transformers pools one micro-batch of one rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtuner_hydra.config.schema import MoEConfig
from xtuner_hydra.model.layers import swiglu


class Routing(NamedTuple):
    """What a router did with T tokens; for several layers, with a leading dimension. All fp32, the second with a gradient."""

    counts: Tensor
    """(experts,) tokens sent to each."""
    probabilities: Tensor
    """(experts,) the router's probabilities, summed over the tokens."""
    entropy: Tensor
    """() entropy of the router's probabilities, in nats, summed over the tokens."""


class MoE(nn.Module):
    """x (T, hidden) -> (the chosen experts' outputs weighted by the router's probabilities, (T, hidden); Routing)."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config)
        self.experts = Experts(hidden_size, config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        weights, chosen, routing = self.gate(x)
        each = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        # the copies of a token are adjacent before sorting: the gradient of x is one sum over them, not a scattered addition
        copies = x.unsqueeze(1).expand(-1, each, -1).reshape(-1, x.shape[1])
        out = self.experts(copies.index_select(0, order), routing.counts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        out = out.index_select(0, back).unflatten(0, (-1, each))
        return torch.bmm(weights.unsqueeze(1), out).squeeze(1), routing


class Router(nn.Module):
    """x (T, hidden) -> (weights (T, k) in x's dtype, experts (T, k), Routing). Probabilities are fp32, over all experts."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.each, self.normalised = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
        logits = F.linear(x, self.weight).float()
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.each, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        with torch.no_grad():
            ones = torch.ones(chosen.numel(), device=x.device)
            counts = torch.zeros(len(self.weight), device=x.device).index_add_(0, chosen.flatten(), ones)
            entropy = torch.special.entr(probabilities).sum()
        return weights.to(x.dtype), chosen, Routing(counts, probabilities.sum(0), entropy)

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, each token to {self.each}"


class Experts(nn.Module):
    """Rows sorted by expert, (rows, hidden), and each expert's number of rows -> the outputs of their SwiGLU MLPs, (rows, hidden)."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        number, inner = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(number, 2 * inner, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(number, hidden_size, inner))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        product = grouped if rows.is_cuda and rows.dtype == torch.bfloat16 else one_by_one
        gate, up = product(rows, self.gate_up_proj, counts).chunk(2, dim=-1)
        return product(swiglu(gate, up), self.down_proj, counts)

    def extra_repr(self) -> str:
        number, hidden, inner = self.down_proj.shape
        return f"{number} of {hidden} x {inner}"


def grouped(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """rows (n, in), sorted by expert; weights (experts, out, in); counts (experts,) -> (n, out), in one kernel that the host does not wait for."""
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=counts.to(torch.int32).cumsum(0, dtype=torch.int32))


def one_by_one(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The same, expert after expert."""
    parts = rows.split([int(count) for count in counts.tolist()])
    # unbind, not indices: its backward pass is one stack, an index's is a full tensor of zeros for each expert
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights.unbind(), strict=True)])


def load_balancing_loss(counts: Tensor, probabilities: Tensor, each: int) -> Tensor:
    """This rank's part of the load-balancing loss; the parts of all ranks sum to it, which is `each` if the load is even.

    counts: (layers, experts), tokens sent to each expert on all ranks; probabilities: the same shape, summed over this rank's tokens;
    each: experts per token. The gradient goes through the probabilities."""
    tokens = counts.sum() / each  # counted once per layer
    return counts.shape[1] * (counts.sum(0) / tokens * probabilities.sum(0) / tokens).sum()
