"""One optimizer step: micro-batches -> loss, gradients, clipping, update. Knows nothing of files.

The loss is the sum of cross-entropy over all supervised tokens of the step, over ranks and micro-batches, divided by their number, which is
known before the forward pass. So the result does not depend on how the same packs are spread over ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner_hydra.data.batch import PackedBatch
from xtuner_hydra.errors import TrainingError
from xtuner_hydra.model.transformer import CausalLM


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean cross-entropy over the step's supervised tokens on all ranks, scalar fp32 on the device; `grad_norm` before clipping."""

    loss: Tensor
    grad_norm: float
    updated: bool


class Engine:
    """Trains `model` (after `parallelize`) with `optimizer` on `dp_size` data-parallel ranks."""

    def __init__(self, model: CausalLM, optimizer: torch.optim.Optimizer, *, dp_size: int, max_grad_norm: float, nonfinite: str) -> None:
        self.model = model
        self.optimizer = optimizer
        self.dp_size = dp_size
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite

    def train_step(self, micro_batches: Sequence[PackedBatch], supervised_tokens: int, lr: float) -> StepResult:
        """Take one step at learning rate `lr`. `supervised_tokens` counts the labels of the step on all ranks.

        Raises TrainingError on a non-finite loss or gradient before the update where the policy is `error`; with `skip` the update is left out."""
        loss = self._backward(micro_batches, supervised_tokens)
        grad_norm = self._clip()
        # The update must not happen on a NaN, so this one number is read back in every step.
        norm = float(grad_norm)
        updated = math.isfinite(norm)
        if not updated and self.nonfinite == "error":
            raise TrainingError(
                f"the gradient's norm is {norm}, the loss {float(loss)}; the update was not made. "
                "Lower optimizer.lr, look at the data of this step, or set optimizer.nonfinite=skip to leave such updates out"
            )
        if updated:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss, norm, updated)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[PackedBatch]) -> tuple[float, int]:
        """(mean cross-entropy, supervised tokens) over this rank's `batches` and those of all others; every rank must pass equally many."""
        device = next(self.model.parameters()).device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            total += torch.stack([self._loss_sum(batch).double(), torch.tensor(len(batch.targets), dtype=torch.float64, device=device)])
        dist.all_reduce(total)
        loss_sum, tokens = total.tolist()
        return loss_sum / tokens, int(tokens)

    def _backward(self, micro_batches: Sequence[PackedBatch], supervised_tokens: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=next(self.model.parameters()).device)
        for batch in micro_batches:
            loss = self._loss_sum(batch) / supervised_tokens
            # FSDP averages gradients over the ranks; their sum is meant
            (loss * self.dp_size).backward()
            total += loss.detach()
        dist.all_reduce(total)
        return total

    def _loss_sum(self, batch: PackedBatch) -> Tensor:
        return self.model(batch.ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, rows=batch.rows, targets=batch.targets)

    def _clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm` by their true norm over all ranks, and return that norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
