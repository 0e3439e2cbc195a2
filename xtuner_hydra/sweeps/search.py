"""Where a sweep's jobs come from: a list (grid, zip), or Optuna, which draws them as results come in and stops hopeless ones.

A search is asked for the swept overrides of the next job, hears of evaluations, and is told how each job ended. It knows jobs by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from xtuner_hydra.config.schema import SweepConfig
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.sweeps.space import Parameter

if TYPE_CHECKING:
    import optuna

DATABASE = "optuna.db"
SEED = 0
"""Of the sampler: where one job runs at a time, a search draws the same jobs when it is repeated."""
STARTUP = 5
"""Jobs that are drawn at random before the model of what is good decides."""


class Search(Protocol):
    """What the sweep asks of it."""

    def ask(self, number: int) -> list[str] | None:
        """The swept overrides of job `number`, which is new; None when there are no more."""
        ...

    def is_hopeless(self, number: int, tokens: int, value: float) -> bool:
        """Hear of an evaluation of job `number` after `tokens` training tokens; True where it is not worth going on with."""
        ...

    def tell(self, number: int, value: float | None, *, pruned: bool) -> None:
        """Job `number` has ended for good with `value`, None where it failed or, `pruned`, was stopped as hopeless."""
        ...


class Listed:
    """A grid or a zipped list: its jobs are all planned from the start, and run to their ends."""

    def ask(self, number: int) -> list[str] | None:
        return None

    def is_hopeless(self, number: int, tokens: int, value: float) -> bool:
        return False

    def tell(self, number: int, value: float | None, *, pruned: bool) -> None:
        pass


class Drawn:
    """`random` and `bayes` through Optuna (Akiba et al. 2019): TPE (Bergstra et al. 2011) with constant liars for jobs that still run, and
    asynchronous successive halving (Li et al. 2018) on tokens as the resource. The study in sweep_dir/optuna.db outlives the process."""

    def __init__(self, parameters: Sequence[Parameter], sweep: SweepConfig, sweep_dir: Path, *, tokens: int) -> None:
        """tokens: that a job trains on to its end; rungs are at tokens / reduction_factor**k for k = 2, 1."""
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.total = sweep.trials
        self.distributions = {parameter.key: _distribution(parameter) for parameter in parameters}
        self.study = optuna.create_study(
            storage=f"sqlite:///{sweep_dir / DATABASE}", study_name="sweep", load_if_exists=True, direction=sweep.direction
        )
        # jobs and trials are numbered alike
        self.trials = {trial.number: optuna.trial.Trial(self.study, trial._trial_id) for trial in self.study.get_trials(deepcopy=False)}
        seed = SEED + len(self.trials)  # or a search that goes on would draw its first jobs again
        bayes = sweep.search == "bayes"
        self.study.sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP) if bayes else optuna.samplers.RandomSampler(seed=seed)
        )
        if sweep.early_stop:
            factor = sweep.reduction_factor
            self.study.pruner = optuna.pruners.SuccessiveHalvingPruner(max(1, tokens // factor**2), reduction_factor=factor)
        else:
            self.study.pruner = optuna.pruners.NopPruner()

    def ask(self, number: int) -> list[str] | None:
        if number >= self.total:
            return None
        if number not in self.trials:
            trial = self.study.ask(self.distributions)
            assert trial.number == number, "jobs and trials are numbered alike"
            self.trials[number] = trial
        params = self.trials[number].params
        return [f"{key}={_text(params[key])}" for key in self.distributions]

    def is_hopeless(self, number: int, tokens: int, value: float) -> bool:
        trial = self.trials[number]
        if self.study.trials[number].state.is_finished():  # a failed job that a resumed sweep runs again
            return False
        if tokens not in self.study.trials[number].intermediate_values:  # a job that was resumed evaluates again
            trial.report(value, tokens)
        return trial.should_prune()

    def tell(self, number: int, value: float | None, *, pruned: bool) -> None:
        from optuna.trial import TrialState

        if value is not None and math.isfinite(value):
            self.study.tell(number, value, skip_if_finished=True)
        else:
            self.study.tell(number, state=TrialState.PRUNED if pruned else TrialState.FAIL, skip_if_finished=True)


def _optuna():  # type: ignore[no-untyped-def]
    try:
        import optuna
    except ImportError:
        raise RefusedError("sweep.search: random and bayes need Optuna; pip install 'xtuner-hydra[sweep]'") from None
    return optuna


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.interval is None:
        return CategoricalDistribution(tuple(dict.fromkeys(parameter.values)))
    low, high = parameter.interval
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=parameter.log)
    return FloatDistribution(low, high, log=parameter.log)


def _text(value: object) -> str:
    """A drawn value as an override says it. Four digits of a float decide nothing less, and can be read."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
