"""Which checkpoints stay: the newest, every n-th for good, the best by a metric. Nothing goes before its successor is committed."""

from __future__ import annotations

import shutil
from pathlib import Path

from xtuner_hydra.checkpoint.commit import committed, leftovers, remove, step_of
from xtuner_hydra.checkpoint.state import state_file
from xtuner_hydra.config.schema import CheckpointConfig


def surplus(parent: Path, newest: int, *, every: int | None = None, best: str | None = None, just_saved: Path | None = None) -> list[Path]:
    """The committed directories under `parent` that are not among the `newest`, nor at a multiple of `every` steps, nor the one with the
    smallest metric `best`. `just_saved` counts as the newest, though a run that went further may have left later ones."""
    found = committed(parent)
    ranked = [path for path in found if path != just_saved] + [path for path in found if path == just_saved]
    kept = set(ranked[-newest:])
    kept |= {path for path in found if every and step_of(path) % every == 0}
    kept |= {path for path in [best_of(found, best)] if path} if best else set()
    return [path for path in found if path not in kept]


def best_of(checkpoints: list[Path], metric: str) -> Path | None:
    """The checkpoint with the smallest `metric` in the evaluation after its step; None where none was evaluated."""
    values = {path: value for path in checkpoints if (value := evaluated(path).get(metric)) is not None}
    return min(values, key=values.__getitem__) if values else None


def evaluated(checkpoint: Path) -> dict[str, float | int | None]:
    """Metrics of the evaluation after the checkpoint's step, empty where there was none."""
    return state_file(checkpoint)["state"]["evaluation"]


def tidy(parent: Path, config: CheckpointConfig, just_saved: Path | None = None) -> list[Path]:
    """Delete what `config` does not keep, and what interrupted saves have left; what was deleted. No save may be under way."""
    gone = surplus(parent, config.keep, every=config.keep_every, best=config.keep_best, just_saved=just_saved)
    for path in gone:
        remove(path)
    for path in (rest := leftovers(parent)):
        shutil.rmtree(path)
    return gone + rest
