"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, matrix by matrix.

torch.optim.Muon does the same for single matrices, in bfloat16 whatever the run computes in (a hundred times slower than float32 on a CPU
that lacks it), and rejects a mixture's experts, which are stacks of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that maps singular values in (0, 1] to about 0.7 to 1.2 in STEPS iterations (https://kellerjordan.github.io/posts/muon)."""
STEPS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """For parameters (..., rows, columns), each a matrix or a stack of them. In a group with `stacked`=n each matrix is n matrices stacked by
    rows, orthogonalised separately.

    Momentum is Nesterov's, weight decay decoupled. An update is scaled to a root mean square of about 0.2 `lr`, which is AdamW's usual one (Liu et
    al. 2025, section 2.2), so that both can share a learning rate. dtype: of the orthogonalisation."""

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0, momentum: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "stacked": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` belongs to torch's interface and is not called."""
        for group in self.param_groups:
            lr, momentum, stacked = group["lr"], group["momentum"], group["stacked"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                weight, gradient, buffer = map(_own_matrices, (parameter, parameter.grad, state["momentum_buffer"]))
                buffer.lerp_(gradient, 1 - momentum)
                matrices = gradient.lerp(buffer, momentum)
                if stacked > 1:
                    matrices = matrices.unflatten(-2, (stacked, -1))  # (..., n rows, columns) -> (..., n, rows, columns)
                update = orthogonalise(matrices, self.dtype).reshape_as(weight)
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * lr * math.sqrt(max(matrices.shape[-2:])))


def _own_matrices(tensor: Tensor) -> Tensor:
    """This rank's matrices (perhaps none) of a stack that FSDP shards by matrix; a single matrix, of which every rank has rows, unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) and tensor.ndim > 2 else tensor


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest orthogonal matrix, roughly, to each of `matrices` (..., rows, columns), in `dtype`: singular vectors stay, singular values
    become 0.7 to 1.2. By Newton-Schulz iteration, which needs only products."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if is_tall else x  # x x^T is smaller over the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
