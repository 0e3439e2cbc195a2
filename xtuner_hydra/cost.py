"""What a run will cost before it has begun: parameters, memory, disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from xtuner_hydra.config.schema import CheckpointConfig, Config
from xtuner_hydra.model.adapters import blueprint, is_adapter
from xtuner_hydra.model.pretrained import keep_frozen_as_stored, pretrained_dtype
from xtuner_hydra.optim.optimizers import count_moments


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters. moments: those that the optimizer keeps of the trained ones."""

    total: int
    trainable: int
    moments: int
    exported: int
    """In a Hugging Face export."""
    export_itemsize: int = 4
    """Bytes of each of them there: an export of whole weights keeps the dtype of `pretrained`."""

    frozen_bytes: int = 0
    """Of the weights that are not trained, which keep the dtype that they are stored in."""

    @property
    def state_bytes(self) -> int:
        """fp32 weights, gradients and moments of what is trained, weights of what is frozen."""
        return 4 * (2 * self.trainable + self.moments) + self.frozen_bytes


def count_parameters(config: Config) -> Sizes:
    """Count those of the model. Raises ConfigError where it cannot be built."""
    model = blueprint(config)
    if config.model.pretrained:
        keep_frozen_as_stored(model, config.model.pretrained)
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    adapter = _count(parameter for name, parameter in parameters.items() if is_adapter(name))
    total = _count(parameters.values())
    return Sizes(
        total=total,
        trainable=_count(trained.values()),
        moments=sum(parameter.numel() * count_moments(name, parameter, config.optimizer) for name, parameter in trained.items()),
        exported=adapter if config.exports_adapter else total - adapter,
        export_itemsize=_export_itemsize(config),
        frozen_bytes=sum(parameter.nbytes for name, parameter in parameters.items() if name not in trained),
    )


def _export_itemsize(config: Config) -> int:
    if config.exports_adapter or config.model.pretrained is None:
        return 4
    return 4 if pretrained_dtype(config.model.pretrained) == "float32" else 2


def memory_gb(sizes: Sizes) -> float:
    """GB that a job on a CPU will take, roughly: weights, gradients and moments, as much again for activations and what the allocator
    keeps (measured for the main job: 7.4 GB), and 1 GB for the program itself."""
    return 1.0 + 2 * sizes.state_bytes / 2**30


def disk_bytes(config: Config, sizes: Sizes, total_steps: int) -> int:
    """Bytes of the checkpoints (fp32 weights and moments of what is trained) and exports that a run leaves."""
    checkpoints, exports = kept(config.checkpoint, total_steps)
    return checkpoint_bytes(sizes) * checkpoints + export_bytes(sizes) * exports


def checkpoint_bytes(sizes: Sizes) -> int:
    """Bytes of one checkpoint."""
    return 4 * (sizes.trainable + sizes.moments)


def export_bytes(sizes: Sizes) -> int:
    """Bytes of one export."""
    return sizes.export_itemsize * sizes.exported


def kept(checkpoint: CheckpointConfig, total_steps: int) -> tuple[int, int]:
    """How many checkpoints and exports stand at the end, at most: the best checkpoint may be one that stays anyhow."""
    saved = _saved(checkpoint.interval, total_steps)
    older = saved[: -checkpoint.keep]
    for_good = [step for step in older if checkpoint.keep_every and step % checkpoint.keep_every == 0]
    best = checkpoint.keep_best is not None and len(for_good) < len(older)
    exports = _saved(checkpoint.hf_interval, total_steps)[-checkpoint.hf_keep :]
    return len(saved) - len(older) + len(for_good) + best, len(exports)


def _saved(interval: int | None, total: int) -> Sequence[int]:
    """The steps that are saved."""
    if interval is None:
        return []
    return [total] if interval == -1 else [*range(interval, total, interval), total]


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
