"""Functions of single elements and of rows, each of which torch.compile turns into one pass over memory.

Norms, rotations, SwiGLU and the softmax of the loss: eager torch passes over memory once per operation, which on any device costs more than
the arithmetic. Matrix products and attention have their own kernels; compiling them would gain nothing and cost minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Pointwise:
    """A function of tensors, compiled or not: the same result but for rounding of intermediate values, which compiled code keeps in fp32."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.eager = self._now = function

    def __call__(self, *args: Any) -> Any:
        return self._now(*args)

    def use_compiled(self, enabled: bool) -> None:
        """Compile at the next call, once for all lengths; or go back to eager."""
        self._now = torch.compile(self.eager, dynamic=True) if enabled else self.eager


_ALL: list[Pointwise] = []


def pointwise(function: Callable[..., Any]) -> Pointwise:
    """Mark a function as worth compiling."""
    _ALL.append(Pointwise(function))
    return _ALL[-1]


def compile_pointwise(enabled: bool) -> None:
    """Compile every marked function in this process from its next call on, or go back to eager."""
    for one in _ALL:
        one.use_compiled(enabled)
