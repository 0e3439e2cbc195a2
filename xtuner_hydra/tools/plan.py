"""`plan [overrides]`: do all that comes before training, build the model on the meta device, print what would happen, and stop."""

from __future__ import annotations

import torch

from xtuner_hydra.app import App
from xtuner_hydra.config.schema import Config
from xtuner_hydra.errors import EXIT_DONE, RefusedError
from xtuner_hydra.launch import Prepared, prepare
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.optim.schedules import learning_rate, warmup_steps


def main(argv: list[str]) -> int:
    """Print the plan of one run; refuses what the run would refuse."""
    with App(argv) as app:
        if app.shows_something():
            return EXIT_DONE
        if app.is_sweep:
            raise RefusedError("plan: give one run's overrides, without -m")
        prepared = prepare(app.compose(app.overrides))
    print("\n".join(describe(prepared)))
    return EXIT_DONE


def describe(prepared: Prepared) -> list[str]:
    """The plan as lines of text."""
    config, data = prepared.config, prepared.data
    parameters = count_parameters(config)
    weights = 4 * parameters
    return [
        *data.summary(),
        "",
        _line("run directory", str(prepared.composition.run_dir)),
        _line("continues from", str(prepared.checkpoint))
        if prepared.checkpoint
        else _line("starts from", config.model.pretrained or "random weights"),
        _line("model", f"{config.model.family}, {parameters / 1e6:.2f} M parameters"),
        _line("ranks", f"{prepared.ranks} ({config.parallelism.param_dtype} compute, fp32 master weights)"),
        _line("steps", f"{data.plan.total_steps} ({config.trainer.global_batch_size} packs a step over all ranks)"),
        _line("tokens", f"{data.plan.total_tokens:,}"),
        _line("packs an epoch", f"{len(data.plan.epoch_packs(0))}, {data.plan.utilization:.1%} full"),
        _line("learning rate", _schedule(config, data.plan.total_steps)),
        _line("memory", f"{_gb(weights * 4 / prepared.ranks)} GB a rank for weights, gradients and two moments, activations apart"),
        _line("disk", _disk(config, parameters, data.plan.total_steps)),
    ]


def count_parameters(config: Config) -> int:
    """Parameters of the model."""
    with torch.device("meta"):
        model = CausalLM(config.model)
    return sum(parameter.numel() for parameter in model.parameters())


def _schedule(config: Config, total: int) -> str:
    scheduler, peak = config.scheduler, config.optimizer.lr
    warmup = warmup_steps(scheduler, total)
    rates = [learning_rate(scheduler, step, total, peak) for step in (0, min(warmup, total - 1), total // 2, total - 1)]
    return (
        f"{scheduler.name}, {warmup} warm-up steps: {rates[0]:.3g} first, {rates[1]:.3g} peak, {rates[2]:.3g} half-way, {rates[3]:.3g} last"
    )


def disk_bytes(config: Config, parameters: int, total: int) -> int:
    """Bytes of the checkpoints (fp32 weights and two moments) and exports (fp32) that a run of `total` steps leaves."""
    checkpoint = config.checkpoint
    return (
        4 * parameters * (3 * _kept(checkpoint.interval, checkpoint.keep, total) + _kept(checkpoint.hf_interval, checkpoint.hf_keep, total))
    )


def _disk(config: Config, parameters: int, total: int) -> str:
    checkpoints = _kept(config.checkpoint.interval, config.checkpoint.keep, total)
    exports = _kept(config.checkpoint.hf_interval, config.checkpoint.hf_keep, total)
    # one more of each stands while the next is written, before the oldest goes
    return (
        f"about {_gb(disk_bytes(config, parameters, total))} GB at the end "
        f"({checkpoints} checkpoints of {_gb(12 * parameters)} GB, {exports} exports of {_gb(4 * parameters)} GB)"
    )


def _kept(interval: int | None, keep: int, total: int) -> int:
    """How many will stand at the end."""
    if interval is None:
        return 0
    return 1 if interval == -1 else min(keep, -(-total // interval))


def _gb(size: float) -> str:
    gb = size / 2**30
    return f"{gb:.3g}" if gb < 100 else f"{gb:.0f}"


def _line(name: str, value: str) -> str:
    return f"{name:<16}{value}"
