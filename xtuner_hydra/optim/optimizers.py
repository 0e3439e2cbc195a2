"""The optimizers of a config: what each parameter gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xtuner_hydra.config.schema import OptimizerConfig
from xtuner_hydra.optim.muon import Muon


def build_optimizers(model: nn.Module, config: OptimizerConfig, compute_dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """One optimizer for all trained parameters, or with `muon` one for the hidden matrices, in `compute_dtype`, and one for the rest.

    `adamw` (Loshchilov & Hutter 2019): fused, one pass over weights, gradients and moments. `sgd`: with Nesterov momentum unless that is 0;
    weight decay is added to the gradient. `muon` (Jordan et al. 2024): for hidden matrices, those of each expert separately; embeddings, head,
    norms and biases use AdamW, at the same learning rate and weight decay."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return [torch.optim.SGD(_groups(trained, config), lr=config.lr, momentum=config.momentum, nesterov=nesterov, foreach=True)]
    if config.name == "adamw":
        return [_adamw(trained, config)]
    hidden = {name: parameter for name, parameter in trained.items() if is_hidden_matrix(name, parameter)}
    rest = {name: parameter for name, parameter in trained.items() if name not in hidden}
    fused = {
        name: parameter for name, parameter in hidden.items() if name.endswith("experts.gate_up_proj")
    }  # each expert's gate above its up
    groups = _groups({name: parameter for name, parameter in hidden.items() if name not in fused}, config)
    groups += [group | {"stacked": 2} for group in _groups(fused, config)]
    muon = Muon(groups, lr=config.lr, momentum=config.momentum, dtype=compute_dtype) if groups else None
    return [optimizer for optimizer in (muon, _adamw(rest, config) if rest else None) if optimizer is not None]


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix between hidden states, or a stack of experts': not the embedding, the head, a norm, a bias."""
    return parameter.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name


def count_moments(name: str, parameter: torch.Tensor, config: OptimizerConfig) -> int:
    """How many tensors of a trained parameter's size its optimizer keeps."""
    if config.name == "sgd":
        return int(config.momentum > 0)
    return 1 if config.name == "muon" and is_hidden_matrix(name, parameter) else 2


def _adamw(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    beta1, beta2 = config.betas
    return torch.optim.AdamW(_groups(parameters, config), lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def _groups(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices and embeddings with weight decay; norms and biases (fewer than two dimensions) without, unless `decay_all`."""
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2 or config.decay_all]
    kept = [parameter for parameter in parameters.values() if parameter.ndim < 2 and not config.decay_all]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
