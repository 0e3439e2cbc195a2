"""What a tracker is, and all of a run's trackers as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

log = logging.getLogger("xtuner_hydra")

Row = dict[str, float | int | None]
"""Metrics by name (README, "Metrics"). A row with `train/loss` is a step, one with `eval/loss` an evaluation; both have `train/step`."""

Sample = dict[str, Any]
"""An answer to one of trainer.sample_prompts: `train/step`, `prompt`, `text`."""

METRICS = (
    *("train/step", "train/epoch", "train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/supervised_tokens"),
    *("train/total_tokens", "train/skipped_updates", "train/aux_loss", "router/max_load", "router/entropy"),
    *("throughput/tgs", "throughput/e2e_tgs", "throughput/step_time", "throughput/data_time", "throughput/mfu"),
    *("throughput/pack_utilization", "memory/max_gb", "memory/reserved_gb"),
    *("eval/loss", "eval/perplexity", "eval/tokens"),
)
"""Every metric's name, in the order of a row."""

MORE_IS_BETTER = ("throughput/tgs", "throughput/e2e_tgs", "throughput/mfu", "throughput/pack_utilization", "router/entropy")


class Tracker(Protocol):
    """A place where metrics go."""

    required: bool
    """Whether a run must stop when this tracker fails."""

    def log(self, row: Row) -> None:
        """Take a row."""
        ...

    def show(self, samples: list[Sample]) -> None:
        """Take the answers to trainer.sample_prompts at one step."""
        ...

    def finish(self, state: str, exit_code: int) -> None:
        """The run has ended as `state` (completed, failed, interrupted): write what is left and close."""
        ...


class Trackers:
    """All trackers of a run. One that fails is left out from then on with a warning, as a dashboard must not fail a run."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = list(trackers)

    def log(self, row: Row) -> None:
        """Hand `row` to every tracker. Raises only the errors of required ones."""
        self._each(lambda tracker: tracker.log(row))

    def show(self, samples: list[Sample]) -> None:
        """Hand `samples` to every tracker, likewise."""
        self._each(lambda tracker: tracker.show(samples))

    def finish(self, state: str, exit_code: int) -> None:
        """Close every tracker, the last one opened first. Raises nothing."""
        for tracker in reversed(self.trackers):
            try:
                tracker.finish(state, exit_code)
            except Exception as error:
                log.warning(f"{type(tracker).__name__} could not be closed: {error}")
        self.trackers = []

    def _each(self, hand: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                hand(tracker)
            except Exception as error:
                self._leave_out(tracker, error)

    def _leave_out(self, tracker: Tracker, error: Exception) -> None:
        if tracker.required:
            raise error
        log.warning(f"{type(tracker).__name__} failed and is left out from now on: {error}")
        self.trackers.remove(tracker)
