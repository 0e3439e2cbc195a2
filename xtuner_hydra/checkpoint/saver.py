"""Saves a run's checkpoints: at once, or in the background from a copy (checkpoint.asynchronous)."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from xtuner_hydra.checkpoint import retention
from xtuner_hydra.checkpoint.commit import commit, on_first_rank
from xtuner_hydra.checkpoint.state import Snapshot
from xtuner_hydra.config.schema import CheckpointConfig

log = logging.getLogger("xtuner_hydra")


class Saver:
    """One at a time: a save waits for the one before it. `save` and `wait` are collective.

    step: of the last checkpoint that was saved or begun. seconds: what the last one took."""

    def __init__(self, directory: Path, config: CheckpointConfig, timeout: timedelta, first_guess: float) -> None:
        """first_guess: seconds that a save may take, used until there has been one."""
        self.directory = directory
        self.config = config
        self.step: int | None = None
        self.seconds = first_guess
        self._pending: Future[None] | None = None
        if config.asynchronous:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
            # ranks agree on a save while training continues, so not over its channel
            self._group = dist.new_group(backend="gloo", timeout=timeout)
            plain = StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False)
            self._stager = DefaultStager(plain)

    def save(self, snapshot: Snapshot) -> None:
        """Commit checkpoints/step-N, or with checkpoint.asynchronous start to. Raises SaveError for this save or the one before it."""
        self.wait()
        self.step = snapshot.state.step
        if not self.config.asynchronous:
            return self._commit(snapshot, None)
        copied = self._stager.stage(snapshot.tensors)
        assert isinstance(copied, dict)
        self._pending = self._thread.submit(self._commit, replace(snapshot, tensors=copied), self._group)

    def wait(self) -> None:
        """Wait until nothing is being saved. Raises SaveError if the save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def expected_seconds(self) -> float:
        """Seconds that a save may take, with some margin."""
        return 2 * self.seconds

    def failed(self) -> bool:
        """Whether a background save has failed; `wait` raises its error."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def close(self) -> None:
        """Let a save that is under way end, ignoring its failure."""
        if self.config.asynchronous:
            self._thread.shutdown(wait=True)
            self._stager.close()

    def _commit(self, snapshot: Snapshot, group: dist.ProcessGroup | None) -> None:
        began = time.monotonic()
        path = commit(self.directory / f"step-{snapshot.state.step}", lambda staging: snapshot.write(staging, group), group=group)
        on_first_rank(lambda: retention.tidy(self.directory, self.config, path), path, group)
        self.seconds = time.monotonic() - began
        log.info(f"checkpoint saved: {path} ({self.seconds:.1f} s)")
