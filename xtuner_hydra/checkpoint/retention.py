"""Which checkpoints are kept: the newest, every n-th permanently, the best by a metric. None is deleted before its successor is committed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from xtuner_hydra.checkpoint.commit import committed, leftovers, remove, step_of
from xtuner_hydra.checkpoint.state import state_file
from xtuner_hydra.config.schema import CheckpointConfig


def reasons(
    whole: list[Path], newest: int, *, every: int | None = None, best: str | None = None, just_saved: Path | None = None
) -> dict[Path, list[str]]:
    """Why each of `whole` (oldest first) is kept: it is among the `newest`, at a multiple of `every` steps, or has the smallest metric `best`.
    Those without a reason are deleted. `just_saved` counts as the newest, though a run that went further may have left later ones."""
    why: dict[Path, list[str]] = {path: [] for path in whole}
    ranked = [path for path in whole if path != just_saved] + [path for path in whole if path == just_saved]
    for path in ranked[-newest:]:
        why[path].append("newest")
    for path in whole:
        if every and step_of(path) % every == 0:
            why[path].append(f"every {every}")
    if best and (chosen := best_of(whole, best)):
        why[chosen].append(f"best {best}")
    return why


def surplus(parent: Path, newest: int, *, every: int | None = None, best: str | None = None, just_saved: Path | None = None) -> list[Path]:
    """The committed directories under `parent` that have no reason to stay."""
    why = reasons(committed(parent), newest, every=every, best=best, just_saved=just_saved)
    return [path for path, reason in why.items() if not reason]


def best_of(checkpoints: list[Path], metric: str) -> Path | None:
    """The checkpoint with the smallest `metric` in the evaluation after its step, the oldest of equal ones; None if none has a number."""
    values = {path: value for path in checkpoints if (value := evaluated(path).get(metric)) is not None and math.isfinite(value)}
    return min(values, key=values.__getitem__) if values else None


def evaluated(checkpoint: Path) -> dict[str, float | int | None]:
    """Metrics of the evaluation after the checkpoint's step, empty if there was none or if its state.json cannot be read."""
    try:
        return dict(state_file(checkpoint)["state"]["evaluation"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def tidy(parent: Path, config: CheckpointConfig, just_saved: Path | None = None) -> list[Path]:
    """Delete what `config` does not keep, and what interrupted saves have left; returns what was deleted. No save may be under way."""
    gone = surplus(parent, config.keep, every=config.keep_every, best=config.keep_best, just_saved=just_saved)
    for path in gone:
        remove(path)
    for path in (rest := leftovers(parent)):
        shutil.rmtree(path)
    return gone + rest
