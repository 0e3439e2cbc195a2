"""xtuner_hydra: say what to train as a handful of YAML groups; get a run you can trust, compare and repeat."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtuner_hydra.results.run import Run

__version__ = "0.1.0"


def load_run(directory: str | os.PathLike[str]) -> Run:
    """A run directory for a notebook or a script, whatever its state: running, completed, failed, interrupted or killed.

        run = xtuner_hydra.load_run("outputs/mine")
        run.state, run.step, run.total_steps           # "completed", 100, 100
        run.config.optimizer.lr                        # the resolved, typed config
        run.final["eval/loss"]                         # the last value of every metric
        run.train["train/loss"]                        # numpy, float64, a value a logged step; run.eval likewise
        pandas.DataFrame(run.train).plot(x="train/total_tokens", y="train/loss")
        run.overrides, run.environment["versions"]     # what was typed, and what it was made with

    What it holds is what was there when it was read; load again to see a running run go on. Raises RefusedError where `directory` holds
    no run, or one that cannot be read."""
    from xtuner_hydra.results.run import load_run as read  # imported here, so that importing the package stays free

    return read(directory)
