"""Learning rates: pure functions of the 0-based step."""

from __future__ import annotations

import math
from collections.abc import Callable

from xtuner_hydra.config.schema import SchedulerConfig


def cosine(step: int, total: int, lr: float, lr_min: float) -> float:
    """Learning rate at 0-based `step` of `total`: half a cosine from `lr` down to `lr_min` (Loshchilov & Hutter 2017, eq. 5)."""
    return lr_min + (lr - lr_min) / 2 * (1 + math.cos(math.pi * step / total))


def linear(step: int, total: int, lr: float, lr_min: float) -> float:
    """A straight line from `lr` at step 0 towards `lr_min` at `total`."""
    return lr + (lr_min - lr) * step / total


def constant(step: int, total: int, lr: float, lr_min: float) -> float:
    """`lr` throughout."""
    return lr


SCHEDULES: dict[str, Callable[[int, int, float, float], float]] = {"cosine": cosine, "linear": linear, "constant": constant}


def wsd(step: int, total: int, lr: float, lr_min: float, decay: int) -> float:
    """`lr`, then over the last `decay` of `total` steps a straight line towards `lr_min` (warm-up, stable, decay: Hu et al. 2024)."""
    return lr if step < total - decay else linear(step - (total - decay), max(1, decay), lr, lr_min)


def warmup_steps(config: SchedulerConfig, total: int) -> int:
    """Steps that warm up: warmup_steps, else warmup_ratio of `total` rounded down; at most all of them."""
    steps = config.warmup_steps if config.warmup_steps is not None else int((config.warmup_ratio or 0) * total)
    return min(steps, total)


def decay_steps(config: SchedulerConfig, total: int) -> int:
    """Steps at the end over which `wsd` decays: decay_ratio of `total`, rounded; at most those that do not warm up."""
    return min(max(1, total - warmup_steps(config, total)), round(config.decay_ratio * total))


def cut_short(config: SchedulerConfig, total: int) -> list[str]:
    """Sentences on settings that `total` steps are too few for."""
    sentences = []
    if (warmup := config.warmup_steps or 0) > total:
        sentences.append(f"scheduler.warmup_steps={warmup}: cut to the run's {total} steps, all of which warm up")
    if config.name == "wsd":
        decay, wanted = decay_steps(config, total), round(config.decay_ratio * total)
        if decay < 2:
            sentences.append(f"scheduler.decay_ratio={config.decay_ratio}: {decay} of {total} steps, too few for the rate to fall")
        elif decay < wanted:
            sentences.append(f"scheduler.decay_ratio={config.decay_ratio}: {decay} steps instead of {wanted}, as the others warm up")
    return sentences


def is_stable(config: SchedulerConfig, step: int, total: int) -> bool:
    """Whether 0-based `step` of `total` is between `wsd`'s warm-up and its decay, where the rate does not depend on `total`."""
    return config.name == "wsd" and warmup_steps(config, total) <= step <= total - decay_steps(config, total)


def learning_rate(config: SchedulerConfig, step: int, total: int, lr: float) -> float:
    """Learning rate at 0-based `step` of `total`: a straight line up to the peak `lr` that starts above 0, then the schedule over the rest.

    Past the planned end the last rate holds. A peak below `lr_min` holds throughout: a schedule never raises the rate."""
    warmup = warmup_steps(config, total)
    if step < warmup:
        return lr * (step + 1) / warmup
    after, rest = min(step, total) - warmup, max(1, total - warmup)
    lr_min = min(config.lr_min, lr)
    if config.name == "wsd":
        return wsd(after, rest, lr, lr_min, decay_steps(config, total))
    return SCHEDULES[config.name](after, rest, lr, lr_min)
