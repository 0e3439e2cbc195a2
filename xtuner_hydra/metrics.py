"""A training step as a row of metrics. Names and meanings are fixed: README, "Metrics"."""

from __future__ import annotations

import math
import time

from xtuner_hydra.checkpoint.state import TrainState
from xtuner_hydra.data.loader import StepBatch
from xtuner_hydra.engine import StepResult
from xtuner_hydra.model.flops import TrainingFlops
from xtuner_hydra.parallel.device import memory_gb
from xtuner_hydra.parallel.runtime import Runtime
from xtuner_hydra.tracking.base import Row


def evaluation(loss: float, tokens: int) -> Row:
    """The metrics of a mean loss over `tokens` held-out labels."""
    perplexity = math.exp(min(loss, 700.0))  # e^700 is near the largest float
    return {"eval/loss": loss, "eval/perplexity": perplexity, "eval/tokens": tokens}


class Meter:
    """Measures steps. Call `data_ready` when a batch has arrived, `count` after every step (`e2e_tgs` needs all of them), `row` for a step that is
    logged, and `restart_step` after anything that is not part of a step. peak_flops: FLOP/s of a device (device.py)."""

    def __init__(self, runtime: Runtime, flops: TrainingFlops, peak_flops: float) -> None:
        self.runtime = runtime
        self.flops = flops
        self.peak_flops = peak_flops
        self.tokens = 0
        self.started = self.step_started = time.perf_counter()
        self.data_time = 0.0

    def restart_step(self) -> None:
        """Count time from now on to the next step, so that an evaluation or a save before it is left out."""
        self.step_started = time.perf_counter()

    def data_ready(self) -> None:
        """The step's batch has arrived."""
        self.data_time = time.perf_counter() - self.step_started

    def count(self, batch: StepBatch) -> None:
        """Count a finished step, whether it is logged or not."""
        self.tokens += batch.tokens

    def row(self, state: TrainState, batch: StepBatch, result: StepResult, lr: float, epoch: float) -> Row:
        """The step's metrics. Reads the loss back from the device; on a GPU the optimizer may still be running."""
        loss = float(result.loss)
        now = time.perf_counter()
        step_time, world = now - self.step_started, self.runtime.world_size
        peak, reserved = memory_gb(self.runtime.device)
        return {
            "train/step": state.step,
            "train/epoch": epoch,
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/tokens": batch.tokens,
            "train/supervised_tokens": batch.supervised_tokens,
            "train/total_tokens": state.tokens,
            "train/skipped_updates": state.skipped_updates,
            "throughput/tgs": batch.tokens / step_time / world,
            "throughput/e2e_tgs": self.tokens / (now - self.started) / world,
            "throughput/step_time": step_time,
            "throughput/data_time": self.data_time,
            "throughput/mfu": self._flops(batch) / step_time / self.peak_flops,
            "throughput/pack_utilization": batch.utilization,
            "memory/max_gb": peak,
            "memory/reserved_gb": reserved,
            **{name: float(value) for name, value in result.more.items()},
        }

    def _flops(self, batch: StepBatch) -> float:
        """FLOPs of this rank's share of the step."""
        return sum(self.flops.of(micro.cu_seqlens.diff().tolist(), len(micro.targets)) for micro in batch.micro_batches if micro.tokens)
