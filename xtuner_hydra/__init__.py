"""xtuner_hydra: say what to train as a handful of YAML groups; get a run you can trust, compare and repeat."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtuner_hydra.results.run import Run

__version__ = "0.1.0"


def load_run(directory: str | os.PathLike[str]) -> Run:
    """A run directory for a notebook: `run.config.optimizer.lr`, `run.final["eval/loss"]`, `pandas.DataFrame(run.train)`.

    Raises RefusedError where `directory` holds no run."""
    from xtuner_hydra.results.run import load_run as read  # imported here, so that importing the package stays free

    return read(directory)
