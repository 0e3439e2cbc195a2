"""The optimizer of a config: parameter groups and torch's own implementations."""

from __future__ import annotations

from typing import Any

import torch

from xtuner_hydra.config.schema import OptimizerConfig


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices and embeddings with weight decay; norms and biases (fewer than two dimensions) without, unless `decay_all`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2 or config.decay_all]
    kept = [parameter for parameter in trainable if parameter.ndim < 2 and not config.decay_all]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused: one pass over weights, gradients and moments."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)
