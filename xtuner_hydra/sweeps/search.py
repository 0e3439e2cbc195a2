"""Where a sweep's jobs come from: a list (grid, zip), or Optuna, which draws them as results come in and stops hopeless ones.

A search is asked for the swept overrides of the next job, and is told of evaluations and of how each job ended."""

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
"""Of the sampler: if one job runs at a time, a repeated search draws the same jobs."""
STARTUP = 5
"""Jobs drawn at random before the sampler's model decides."""


class Search(Protocol):
    """What a sweep needs of a search. A trial is a draw; one that repeats an earlier job does not become a job."""

    def ask(self) -> tuple[int, list[str]] | None:
        """(number of a new trial, its swept overrides); None when there are no more."""
        ...

    def is_hopeless(self, trial: int | None, tokens: int, value: float) -> bool:
        """Take an evaluation of a trial's job after `tokens` training tokens; True if the job is not worth continuing."""
        ...

    def tell(self, trial: int | None, value: float | None, *, pruned: bool = False) -> None:
        """A trial's job has finally ended with `value`, None if it failed or, `pruned`, was stopped as hopeless."""
        ...


class Listed:
    """A grid or a zipped list: its jobs are all planned from the start, and run to their ends."""

    def ask(self) -> tuple[int, list[str]] | None:
        return None

    def is_hopeless(self, trial: int | None, tokens: int, value: float) -> bool:
        return False

    def tell(self, trial: int | None, value: float | None, *, pruned: bool = False) -> None:
        pass


class Drawn:
    """`random` and `bayes` through Optuna (Akiba et al. 2019): TPE (Bergstra et al. 2011) with constant liars for running jobs, and
    asynchronous successive halving (Li et al. 2018) on tokens as the resource. The study in sweep_dir/optuna.db outlives the process."""

    def __init__(
        self, parameters: Sequence[Parameter], sweep: SweepConfig, sweep_dir: Path, *, tokens: int, known: Sequence[int] = ()
    ) -> None:
        """tokens: how many a full job trains on; rungs are at tokens / reduction_factor**k for k = 2, 1. known: trials that are jobs already.

        Raises RefusedError if the study of a resumed sweep is missing or damaged."""
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.distributions = {parameter.key: _distribution(parameter) for parameter in parameters}
        self.study = _study(sweep_dir / DATABASE, sweep.direction, known)
        self.trials = {trial.number: optuna.trial.Trial(self.study, trial._trial_id) for trial in self.study.get_trials(deepcopy=False)}
        for number in self.trials.keys() - set(known):  # drawn just before the sweep was killed, and not recorded
            self.tell(number, None)
        seed = SEED + len(self.trials)  # otherwise a continued search would draw its first jobs again
        bayes = sweep.search == "bayes"
        self.study.sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP) if bayes else optuna.samplers.RandomSampler(seed=seed)
        )
        if sweep.early_stop:
            factor = sweep.reduction_factor
            self.study.pruner = optuna.pruners.SuccessiveHalvingPruner(max(1, tokens // factor**2), reduction_factor=factor)
        else:
            self.study.pruner = optuna.pruners.NopPruner()

    def ask(self) -> tuple[int, list[str]] | None:
        trial = self.study.ask(self.distributions)
        self.trials[trial.number] = trial
        return trial.number, [f"{key}={_text(trial.params[key])}" for key in self.distributions]

    def is_hopeless(self, trial: int | None, tokens: int, value: float) -> bool:
        assert trial is not None
        known = self.study.trials[trial]
        if known.state.is_finished():  # a failed job that a resumed sweep runs again
            return False
        if tokens not in known.intermediate_values:  # a job that was resumed evaluates again
            self.trials[trial].report(value, tokens)
        return self.trials[trial].should_prune()

    def tell(self, trial: int | None, value: float | None, *, pruned: bool = False) -> None:
        from optuna.trial import TrialState

        assert trial is not None
        if value is not None and math.isfinite(value):
            self.study.tell(trial, value, skip_if_finished=True)
        else:
            self.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL, skip_if_finished=True)


def refuse_missing() -> None:
    """RefusedError if Optuna is not installed."""
    _optuna()


def _study(database: Path, direction: str, known: Sequence[int]) -> optuna.Study:
    """The study of a sweep, created if there is none. Raises RefusedError for one that lacks trials in `known`."""
    import optuna

    if known and not database.exists():  # do not create a new one in its place
        raise RefusedError(f"{database}: does not hold {len(known)} of the jobs that were drawn. Restore it, or start another search")
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{database}", study_name="sweep", load_if_exists=True, direction=_direction(direction)
        )
        numbers = {trial.number for trial in study.get_trials(deepcopy=False)}
    except Exception as error:  # SQLAlchemy's, Optuna's and SQLite's own, which share no base
        text = str(error).partition("\n")[0]
        raise RefusedError(f"{database}: cannot be read as an Optuna study ({text}). Restore it, or start another search") from None
    if missing := set(known) - numbers:
        raise RefusedError(f"{database}: does not hold {len(missing)} of the jobs that were drawn. Restore it, or start another search")
    return study


def _direction(name: str) -> optuna.study.StudyDirection:
    from optuna.study import StudyDirection

    return StudyDirection.MINIMIZE if name == "minimize" else StudyDirection.MAXIMIZE


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
    """A drawn value as in an override. Four digits of a float are precise enough, and readable."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
