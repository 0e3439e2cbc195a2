"""Cross-entropy at the supervised positions without ever storing all their logits.

The vocabulary is processed in slices that fit a buffer of fixed size. The forward pass keeps one number per row, log sum exp(logits), and
the logits of the first slices, as many as KEPT allows; the backward pass recomputes the others, turns each slice's logits into their
gradient in place and multiplies it into the gradients of hidden states and head. A slice's head gradient is one product over all rows,
summed in fp32 inside it and rounded once: it needs no accumulator, which chunks of rows would.

The kept logits are freed before the layers' gradients are computed, where a training step's memory peaks, so they do not raise the peak.

Source: Cut Cross-Entropy (Wijmans et al. 2024), which keeps none. torch's own F.linear_cross_entropy (2.13) returns the loss in the inputs' dtype,
too coarse in bf16, and its chunked modes were 5 to 14 times slower on a CPU than one product; in fp32 it is the tests' oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xtuner_hydra.pointwise import pointwise

CPU_CHUNK, CHUNK = 2**22, 2**27
"""Logits at a time: few enough for a CPU's caches; elsewhere enough for large kernels and few passes over the hidden states' gradient."""
KEPT = 2**29
"""Bytes of logits that are kept for the backward pass, which need not recompute them."""
_NARROWEST = 64  # a slice of fewer columns makes a slow product


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int | None = None, kept: int = KEPT) -> Tensor:
    """Sum of -log p(label) over all rows, where p = softmax(hidden weight^T), without ever storing all the logits.

    hidden: (N, hidden) bf16 or fp32; weight: (vocab, hidden) of the same dtype; labels: (N,) int64, every one from 0 to vocab - 1.
    Returns a scalar fp32 sum (divide by the global count of supervised tokens); with N = 0 it is 0, and so are the gradients.
    Sums over rows and, slice by slice, over the vocabulary are fp32; each gradient has the dtype of its tensor.
    Memory: `chunk` logits (None: what suits the device), in fp32 and in the dtype of `hidden`, and until the backward pass up to `kept` more
    bytes of them; neither result nor gradients depend on `kept`. Raises ValueError if shapes or dtypes disagree."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(f"shapes disagree: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"dtypes disagree: hidden {hidden.dtype}, weight {weight.dtype}")
    if chunk is None:
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, kept // hidden.itemsize if torch.is_grad_enabled() else 0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, room: int) -> Tensor:
        ctx.kept = {}
        label_logit = torch.zeros(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        log_sums = []
        for columns, logits, buffer in _slices(hidden, weight, chunk, ctx.kept, room):
            index, inside = _labels_in(labels, columns)
            label_logit += logits.gather(1, index) * inside
            log_sums.append(_log_sum_exp(logits, buffer))
        log_sum = torch.logsumexp(torch.stack(log_sums), 0)
        ctx.save_for_backward(hidden, weight, labels, log_sum, label_logit)
        ctx.chunk = chunk
        return (log_sum - label_logit).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, labels, log_sum, label_logit = ctx.saved_tensors
        label_gradient = torch.expm1(label_logit - log_sum).mul_(grad).to(hidden.dtype)
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        for columns, logits, buffer in _slices(hidden, weight, ctx.chunk, ctx.kept):
            index, inside = _labels_in(labels, columns)
            # d loss / d logits = p - [this column is the label], scaled in fp32
            grad_logits = _scaled_probabilities(logits, buffer, log_sum, grad)
            # by index, not scatter_: that takes 250 times as long in bf16 on a CPU
            grad_logits[rows, index] = label_gradient.where(inside, grad_logits.gather(1, index))
            if grad_hidden is not None:
                grad_hidden += grad_logits @ weight[columns]
            if grad_weight is not None:
                torch.mm(grad_logits.T, hidden, out=grad_weight[columns])
        return grad_hidden.to(hidden.dtype) if grad_hidden is not None else None, grad_weight, None, None, None


@pointwise
def _log_sum_exp(logits: Tensor, buffer: Tensor | None) -> Tensor:
    """(N, 1) fp32 of logits (N, width), computed in `buffer`, fp32 of the same shape; without one, logits are fp32 and overwritten."""
    floats = logits if buffer is None else buffer.copy_(logits)
    largest = floats.amax(1, keepdim=True)
    return floats.sub_(largest).exp_().sum(1, keepdim=True).log_().add_(largest)


@pointwise
def _scaled_probabilities(logits: Tensor, buffer: Tensor | None, log_sum: Tensor, scale: Tensor) -> Tensor:
    """exp(logits - log_sum) * scale, computed in `buffer`, as above, and left in `logits` (N, width)."""
    floats = logits if buffer is None else buffer.copy_(logits)
    floats.sub_(log_sum).exp_().mul_(scale)
    return logits if buffer is None else logits.copy_(floats)


def _slices(
    hidden: Tensor, weight: Tensor, chunk: int, kept: dict[int, Tensor], room: int = 0
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(columns, their logits in hidden's dtype, a buffer of that shape in fp32) for each slice of the vocabulary in turn.

    Logits in `kept`, by their first column, are taken from there; up to `room` new ones are put there. Other tensors are views of memory that
    the next slice overwrites. No buffer if logits are fp32 and may be overwritten."""
    rows, vocab = len(hidden), len(weight)
    width = min(vocab, max(_NARROWEST, chunk // max(rows, 1) // _NARROWEST * _NARROWEST))
    products = hidden.new_empty(rows * width)
    floats = None if hidden.dtype == torch.float32 and not room else products.new_empty(rows * width, dtype=torch.float32)
    for start in range(0, vocab, width):
        columns = slice(start, min(start + width, vocab))
        logits = kept.pop(start, None)
        if logits is None:
            logits = _view(products, rows, columns.stop - start)
            if room >= logits.numel():
                room -= logits.numel()
                kept[start] = logits = torch.empty_like(logits)
            torch.mm(hidden, weight[columns].T, out=logits)
        yield columns, logits, None if floats is None else _view(floats, rows, columns.stop - start)


def _view(flat: Tensor, rows: int, width: int) -> Tensor:
    return flat[: rows * width].view(rows, width)


def _labels_in(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(N, 1) index of each label within `columns`, and whether it is there; some valid index if not."""
    index = labels[:, None] - columns.start
    inside = (index >= 0) & (index < columns.stop - columns.start)
    return index.where(inside, 0), inside
