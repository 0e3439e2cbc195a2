"""Cross-entropy at the supervised positions without ever holding all their logits.

Rows are taken in chunks. A chunk's logits are turned into their own gradient in place, which is multiplied into the gradients of hidden
states and head at once: the forward pass does the work of the backward pass, which only scales. Every sum over chunks is kept in fp32.
Source: chunked loss as in Liger (Hsu et al. 2024) and Cut Cross-Entropy (Wijmans et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[label] over the rows: a scalar in fp32 (divide by the global count of supervised tokens).

    hidden: (N, hidden) bf16 or fp32; weight: (vocab, hidden) of the same dtype; labels: (N,) int64, every one an id below vocab. N may be 0.
    Memory: one (chunk, vocab) buffer, and the head's gradient in fp32. Raises ValueError if shapes or dtypes disagree."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(f"shapes disagree: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; they must be one dtype")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    # inside a Function grad mode is always off: an evaluation must not pay for gradients
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, with_grad: bool) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if with_grad else None
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            target = labels[start : start + chunk, None]
            logits = (rows @ weight.T).float()
            log_sum = torch.logsumexp(logits, -1, keepdim=True)
            loss += (log_sum - logits.gather(1, target)).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = logits.sub_(log_sum).exp_()
                grad.scatter_add_(1, target, grad.new_full((), -1.0).expand_as(target))
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk])
                grad_weight += grad.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], (grad_weight * grads[0]).to(ctx.dtype), None, None, None
