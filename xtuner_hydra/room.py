"""Whether a run fits on the disk and into memory, told before it starts: a disk that is too small would be noticed at the end, by the one save."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from xtuner_hydra.config.schema import Config
from xtuner_hydra.cost import Sizes, checkpoint_bytes, disk_bytes, kept
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.machine import memory_gb
from xtuner_hydra.words import bytes_

log = logging.getLogger("xtuner_hydra")


def refuse_full_disk(config: Config, run_dir: Path, sizes: Sizes, total_steps: int) -> None:
    """RefusedError where not even one checkpoint fits; a warning where all that stands at the end may not."""
    free, checkpoints = free_bytes(run_dir), kept(config.checkpoint, total_steps)[0]
    if free is None:
        return
    if checkpoints and free < (one := checkpoint_bytes(sizes)):
        raise RefusedError(
            f"hydra.run.dir={run_dir}: a checkpoint takes {bytes_(one)}, and only {bytes_(free)} are free there; make room, choose another "
            "directory, or save nothing with checkpoint=none"
        )
    if free < (needed := disk_bytes(config, sizes, total_steps)):
        log.warning(f"{run_dir}: checkpoints and exports will take {bytes_(needed)} in all, and {bytes_(free)} are free there")


def free_bytes(directory: Path) -> int | None:
    """Bytes that can be written to a directory that may not exist yet; None where its file system has no size, as /proc."""
    usage = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists()))
    return usage.free if usage.total else None


def warn_of_memory(sizes: Sizes, shards: int, ranks_here: int) -> None:
    """A warning where weights, gradients and moments of this machine's ranks alone exceed its memory. shards: ranks that share one copy."""
    needed, there = sizes.state_bytes / shards * ranks_here, memory_gb() * 2**30
    if needed > there:
        log.warning(f"weights, gradients and moments take {bytes_(needed)}, and this machine has {bytes_(there)} of memory")
