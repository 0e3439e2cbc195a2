"""For Hydra's sweeper plug-ins (`hydra/sweeper=...`): our launchers under the names that Hydra requires, each batch of jobs a part of one sweep.

A plug-in decides which jobs to run, and gets each one's metric back. Our own searches (sweep.search) need no plug-in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from xtuner_hydra.results.sweep import JobResult

Batch = Callable[[Sequence[Sequence[str]], int], Sequence[JobResult]]
"""(override lists, number of the first job) -> how the jobs ended."""


class SlotsLauncher(Launcher):
    """Hands a batch to the sweep, which is passed where Hydra expects the task function."""

    __module__ = "hydra_plugins.xtuner_hydra"  # Hydra instantiates plug-ins only from hydra_plugins

    def __init__(self, **options: object) -> None:
        """The options are read from the config by sweeps/multirun.py."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.batch: Batch = task_function  # type: ignore[assignment]
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return [_job_return(result, self.config) for result in self.batch(job_overrides, initial_job_idx)]


class SubmititLauncher(SlotsLauncher):
    """The same through submitit."""

    __module__ = "hydra_plugins.xtuner_hydra"


def register() -> None:
    """Make the launchers known to Hydra, as if this module were hydra_plugins.xtuner_hydra, which a checkout cannot install."""
    if "hydra_plugins" not in sys.modules and importlib.util.find_spec("hydra_plugins") is None:
        sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    home = importlib.import_module("hydra_plugins")
    home.xtuner_hydra = sys.modules["hydra_plugins.xtuner_hydra"] = sys.modules[__name__]  # type: ignore[attr-defined]
    for launcher in (SlotsLauncher, SubmititLauncher):
        Plugins.instance().register(launcher)


def _job_return(result: JobResult, config: DictConfig) -> JobReturn:
    """The metric if the job has completed, else an exception, which a sweeper may raise or skip."""
    returned = JobReturn(overrides=result.job.overrides, cfg=OmegaConf.create(), hydra_cfg=config, task_name="xtuner_hydra")
    returned.working_dir = str(Path.cwd())
    if result.value is not None:
        returned.status, returned.return_value = JobStatus.COMPLETED, result.value
    else:
        returned.status = JobStatus.FAILED
        returned.return_value = RuntimeError(f"job {result.number} ({' '.join(result.job.overrides)}) {result.state}: {result.error}")
    return returned
