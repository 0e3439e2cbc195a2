"""What a run will cost before it has begun: parameters, memory, disk."""

from __future__ import annotations

import torch

from xtuner_hydra.config.schema import CheckpointConfig, Config
from xtuner_hydra.model.transformer import CausalLM


def count_parameters(config: Config) -> int:
    """Parameters of the model."""
    with torch.device("meta"):
        model = CausalLM(config.model)
    return sum(parameter.numel() for parameter in model.parameters())


def memory_gb(parameters: int) -> float:
    """GB that a job on a CPU will take, roughly: fp32 weights, gradients and two moments, as much again for activations and what the allocator
    keeps (measured for the main job: 7.4 GB), and 1 GB for the program itself."""
    return 1.0 + 2 * 16 * parameters / 2**30


def disk_bytes(config: Config, parameters: int, total_steps: int) -> int:
    """Bytes of the checkpoints (fp32 weights and two moments) and exports (fp32 weights) that a run leaves."""
    checkpoints, exports = kept(config.checkpoint, total_steps)
    return 4 * parameters * (3 * checkpoints + exports)


def kept(checkpoint: CheckpointConfig, total_steps: int) -> tuple[int, int]:
    """How many checkpoints and exports stand at the end."""
    return (
        _kept(checkpoint.interval, checkpoint.keep, total_steps),
        _kept(checkpoint.hf_interval, checkpoint.hf_keep, total_steps),
    )


def _kept(interval: int | None, keep: int, total: int) -> int:
    if interval is None:
        return 0
    return 1 if interval == -1 else min(keep, -(-total // interval))
