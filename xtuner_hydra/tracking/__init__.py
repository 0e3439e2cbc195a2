"""Where metrics and samples go: console, metrics.jsonl, samples.jsonl, TensorBoard, W&B; one small interface (base.py). Knows nothing of training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtuner_hydra.config.schema import TrackingConfig
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.tracking.base import Tracker, Trackers
from xtuner_hydra.tracking.console import ConsoleTracker
from xtuner_hydra.tracking.jsonl import JsonlTracker, SampleTracker

log = logging.getLogger("xtuner_hydra")


def build_trackers(
    config: TrackingConfig,
    run_dir: Path,
    *,
    resolved: dict[str, Any],
    overrides: list[str],
    total_steps: int,
    start_step: int,
    evaluated: bool = True,
    sampled: bool = True,
    samples: bool = False,
) -> Trackers:
    """The trackers of a run, only for its first rank.

    resolved: the whole config, for W&B and TensorBoard's hyper-parameters. start_step: the step that a resumed run continues from, 0 for a
    new one; later rows are dropped. evaluated, sampled: whether that had been done at that step when it was saved; if not, it will be redone,
    and the step's rows of that kind are dropped too. samples: whether there will be any."""
    experts = resolved["model"]["moe"] or {"router_aux_loss_coef": 0.0}
    trackers: list[Tracker] = [ConsoleTracker(total_steps, start_step, experts["router_aux_loss_coef"])]
    if config.jsonl:
        trackers.append(JsonlTracker(run_dir / "metrics.jsonl", start_step, finished=evaluated))
    if samples:
        trackers.append(SampleTracker(run_dir / "samples.jsonl", start_step, finished=sampled))
    if config.tensorboard:
        from xtuner_hydra.tracking.tensorboard import TensorBoardTracker

        trackers += _opened("TensorBoard", lambda: TensorBoardTracker(run_dir / "tensorboard", start_step, resolved))
    if config.wandb.enabled and not (config.wandb.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        from xtuner_hydra.tracking.wandb import WandbTracker

        trackers += _opened("W&B", lambda: WandbTracker(config.wandb, run_dir, resolved, overrides, start_step))
    return Trackers(trackers)


def _opened(name: str, make: Callable[[], Tracker]) -> list[Tracker]:
    """The tracker that `make` makes; none, with a warning, if it cannot be opened: a dashboard must not fail a run."""
    try:
        return [make()]
    except RefusedError:
        raise
    except Exception as error:
        log.warning(f"{name} is left out of this run: {type(error).__name__}: {error}")
        return []
