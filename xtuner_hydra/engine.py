"""One optimizer step: micro-batches -> loss, gradients, clipping, update. Knows nothing of files.

The loss is the sum of cross-entropy over all supervised tokens of the step, over ranks and micro-batches, divided by their number, which is
known before the forward pass. So the result does not depend on how the same packs are spread over ranks and micro-batches. A mixture of
experts adds its load-balancing loss, which is averaged differently (model/experts.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from xtuner_hydra.data.batch import PackedBatch
from xtuner_hydra.errors import TrainingError
from xtuner_hydra.model.experts import Routing, load_balancing_loss
from xtuner_hydra.model.generation import generate, greedy
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.sharding import reshard
from xtuner_hydra.parallel.watchdog import read_back


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean cross-entropy over the step's supervised tokens on all ranks, scalar fp32 on the device; `grad_norm` before clipping.
    `more`: further metrics by name, scalars on the device."""

    loss: Tensor
    grad_norm: float
    updated: bool
    more: dict[str, Tensor] = field(default_factory=dict)


class Engine:
    """Trains `model` (after `parallelize`) with `optimizers` on `dp_size` data-parallel ranks.

    max_grad_norm: larger gradients are scaled down to this norm. nonfinite: what to do if a loss or gradient is not finite, `error` or `skip`
    (see train_step). at_edge: called before every micro-batch and evaluation batch, on all ranks; if it raises, the weights are unchanged."""

    def __init__(
        self, model: CausalLM, optimizers: Sequence[torch.optim.Optimizer], *, dp_size: int, max_grad_norm: float, nonfinite: str
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.dp_size = dp_size
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.at_edge: Callable[[], None] = lambda: None

    def train_step(self, micro_batches: Sequence[PackedBatch], supervised_tokens: int, lr: float) -> StepResult:
        """Take one step at learning rate `lr`. `supervised_tokens` counts the labels of the step on all ranks.

        If the loss or a gradient is not finite, the update is not made: `nonfinite=error` raises TrainingError, `skip` continues without it."""
        try:
            loss, more = self._backward(micro_batches, supervised_tokens)
            grad_norm = self._norm()
            # An update must not use a NaN, so these two numbers are read back in every step.
            norm, loss_now = read_back(torch.stack([_whole(grad_norm).float(), loss]))
            updated = math.isfinite(norm) and math.isfinite(loss_now)
            if not updated and self.nonfinite == "error":
                raise TrainingError(
                    f"gradient norm {norm}, loss {loss_now}{self._offenders()}; the update was not made. "
                    "Lower optimizer.lr, look at the data of this step, or set optimizer.nonfinite=skip to leave such updates out"
                )
            if updated:
                if norm >= self.max_grad_norm:  # else it would multiply all gradients by one
                    torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, grad_norm)
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    optimizer.step()
        finally:
            for optimizer in self.optimizers:  # also after a step that was aborted
                optimizer.zero_grad()
        return StepResult(loss, norm, updated, more)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[PackedBatch]) -> tuple[float, int]:
        """(mean cross-entropy, supervised tokens) over the `batches` of all ranks; every rank must pass the same number of them."""
        device = next(self.model.parameters()).device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        with self._not_training():
            for batch in batches:
                self.at_edge()
                loss_sum, _ = self._loss_sum(batch)
                total += torch.stack([loss_sum.double(), torch.tensor(len(batch.targets), dtype=torch.float64, device=device)])
        dist.all_reduce(total)
        loss_sum, tokens = total.tolist()
        return loss_sum / tokens, int(tokens)

    def answer(self, prompt: Sequence[int], most: int, stop: Container[int]) -> list[int]:
        """The likeliest ids, up to `most`, that follow `prompt`, without the one of `stop` that ends them. Collective, with the same
        arguments and result on every rank; no random generator is used."""
        with self._not_training():
            return list(generate(self.model, prompt, most=most, stop=stop, choose=_agreed))

    def state_bytes(self) -> int:
        """Bytes that this rank's part of the trained weights and of AdamW's two moments takes up."""
        return 3 * sum(_local(parameter).nbytes for parameter in self.model.parameters() if parameter.requires_grad)

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """No dropout; afterwards free the gathered weights. The backward pass does so after a step; without one, they would stay gathered for
        whoever reads the parameters."""
        self.model.eval()
        try:
            yield
        finally:
            reshard(self.model)
            self.model.train()

    def _offenders(self) -> str:
        """`; not finite: the gradients of A, B and 7 more`, by the parameters' names, over all ranks; the weights instead, where some were not
        finite before the step. Collective."""
        parameters = list(self.model.named_parameters())
        if weights := _not_finite(parameters):
            return f"; not finite already before this step: the weights of {weights}"
        gradients = _not_finite([(name, parameter.grad) for name, parameter in parameters])
        return f"; not finite: the gradients of {gradients}" if gradients else ""

    def _backward(self, micro_batches: Sequence[PackedBatch], supervised_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.zeros((), dtype=torch.float32, device=next(self.model.parameters()).device)
        balance = _Balance(self.model, sum(batch.tokens for batch in micro_batches))
        for batch in micro_batches:
            self.at_edge()
            loss_sum, routing = self._loss_sum(batch)
            loss = loss_sum / supervised_tokens
            # FSDP averages gradients over the ranks; we want their sum
            ((loss + balance.loss(routing, is_real=batch.tokens > 0)) * self.dp_size).backward()
            total += loss.detach()
        dist.all_reduce(total)
        return total, balance.metrics()

    def _loss_sum(self, batch: PackedBatch) -> tuple[Tensor, Routing | None]:
        return self.model(
            batch.ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, rows=batch.rows, targets=batch.targets, with_routing=True
        )

    def _norm(self) -> Tensor:
        """The gradient norm over all parameters and ranks. Clipping comes later, as it would spread one NaN to all gradients."""
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in self.model.parameters() if parameter.grad is not None])


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _not_finite(tensors: Sequence[tuple[str, Tensor | None]]) -> str:
    """The names of those that are not finite on some rank: `A, B and 7 more`. Collective, with the same names on every rank."""
    bad = torch.stack([torch.zeros(()) if tensor is None else (~_local(tensor).isfinite()).any().float().cpu() for _, tensor in tensors])
    dist.all_reduce(bad, dist.ReduceOp.MAX)
    named = [name for (name, _), is_bad in zip(tensors, bad.tolist(), strict=True) if is_bad]
    return ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def _agreed(logits: Tensor) -> Tensor:
    """The first rank's likeliest token: ranks that disagree in the last bit must not generate different texts."""
    chosen = greedy(logits)
    dist.broadcast(chosen, src=0)
    return chosen


class _Balance:
    """The load of the experts over a step: the loss that evens it out, and how even it is. A model without experts has neither."""

    def __init__(self, model: CausalLM, tokens: int) -> None:
        """`tokens`: of this rank's part of the step. Collective."""
        self.config = model.config.moe
        if self.config is None:
            return
        device = next(model.parameters()).device
        self.tokens = torch.tensor(float(tokens), device=device)
        dist.all_reduce(self.tokens)
        self.counts = torch.zeros((), device=device)
        self.sums = torch.zeros(2, device=device)  # this rank's part of the load-balancing loss and the entropies

    def loss(self, routing: Routing | None, *, is_real: bool) -> Tensor | float:
        """This rank's part of a micro-batch's share in the step's loss. Collective. `is_real`: False for a rank without a pack."""
        if self.config is None or routing is None:
            return 0.0
        counts, probabilities, entropy = (value * is_real for value in routing)
        dist.all_reduce(counts := counts.detach())
        each = self.config.num_experts_per_tok
        share = counts[0].sum() / each / self.tokens  # of the step's tokens
        aux = share * load_balancing_loss(counts, probabilities, each)
        self.counts = self.counts + counts
        self.sums += torch.stack([aux.detach(), entropy.sum()])
        return self.config.router_aux_loss_coef * aux

    def metrics(self) -> dict[str, Tensor]:
        """`train/aux_loss` before its coefficient; `router/max_load`: tokens of the busiest expert of any layer, over the mean of its layer;
        `router/entropy`: of the probabilities of a token, in nats, mean over tokens and layers. Collective."""
        if self.config is None:
            return {}
        dist.all_reduce(self.sums)
        aux, entropy = self.sums
        load = self.counts / self.counts.mean(1, keepdim=True)
        return {"train/aux_loss": aux, "router/max_load": load.max(), "router/entropy": entropy / (self.tokens * len(self.counts))}
