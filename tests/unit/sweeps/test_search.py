"""Searches through Optuna: what they draw, what they stop, and that they go on where they were."""

import pytest

from xtuner_hydra.config.schema import SweepConfig
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.sweeps.search import Drawn
from xtuner_hydra.sweeps.space import Parameter

pytest.importorskip("optuna")

LR = Parameter("optimizer.lr", interval=(1e-6, 1e-2), log=True)
SEED = Parameter("trainer.seed", values=("1", "2"))
WIDTH = Parameter("data.max_length", interval=(8, 16))


def drawn(directory, search="bayes", parameters=(LR, SEED, WIDTH), tokens=900, known=(), **options):
    return Drawn(parameters, SweepConfig(search=search, **options), directory, tokens=tokens, known=known)


def values(job):
    return {key: float(text) for key, text in (override.split("=") for override in job)}


@pytest.mark.parametrize("search", ["random", "bayes"])
def test_jobs_are_within_the_space(tmp_path, search):
    found = drawn(tmp_path, search)
    trials, jobs = zip(*(found.ask() for _ in range(12)), strict=True)
    assert trials == tuple(range(12))
    assert len({tuple(job) for job in jobs}) > 6
    for job in map(values, jobs):
        assert 1e-6 <= job["optimizer.lr"] <= 1e-2
        assert job["trainer.seed"] in (1, 2)
        assert job["data.max_length"] in range(8, 17)


def test_bayes_finds_the_better_region_more_often_than_chance(tmp_path):
    """Loss is the distance from lr = 1e-3 in decades; on a log scale 10 % of the interval are within 0.2 of it."""
    from math import log10

    found = drawn(tmp_path, parameters=[LR])
    distances = []
    for number in range(40):
        distances.append(abs(log10(values(found.ask()[1])["optimizer.lr"]) + 3))
        found.tell(number, distances[-1])
    assert sum(distance < 0.2 for distance in distances[20:]) >= 8


def test_a_search_goes_on_where_it_was_and_does_not_repeat_itself(tmp_path):
    whole = drawn(tmp_path)
    first = [whole.ask()[1] for _ in range(4)]
    for number in range(3):
        whole.tell(number, float(number))
    again = drawn(tmp_path, known=[0, 1, 2])
    trial, job = again.ask()
    assert (trial, job in first) == (4, False)
    assert [one.value for one in again.study.trials[:4]] == [0.0, 1.0, 2.0, None]
    assert again.study.trials[3].state.name == "FAIL", "drawn, but never written down as a job"


@pytest.mark.parametrize("damage", ["gone", "garbage"])
def test_a_study_that_is_gone_or_damaged_is_refused_in_words(tmp_path, damage):
    whole = drawn(tmp_path)
    whole.ask()
    whole.study._storage.remove_session()
    if damage == "gone":
        (tmp_path / "optuna.db").unlink()
    else:
        (tmp_path / "optuna.db").write_bytes(b"no database" * 1000)
    with pytest.raises(RefusedError, match=r"optuna\.db"):
        drawn(tmp_path, known=[0])


def test_the_job_that_is_behind_at_a_rung_is_hopeless(tmp_path):
    """Rungs at 900 / 9 = 100 and 300 tokens; one of three goes on."""
    found = drawn(tmp_path, parameters=[LR], early_stop=True)
    for _ in range(4):
        found.ask()
    assert not found.is_hopeless(0, 50, 9.0)  # before the first rung nobody is judged
    assert not found.is_hopeless(1, 120, 1.0)
    assert not found.is_hopeless(2, 120, 0.5)  # better than what came before
    assert found.is_hopeless(3, 120, 2.0)
    found.tell(3, None, pruned=True)
    assert found.study.trials[3].state.name == "PRUNED"
    assert not found.is_hopeless(3, 300, 5.0)  # has ended: nothing to stop


def test_maximizing_stops_the_lower_one(tmp_path):
    found = drawn(tmp_path, parameters=[LR], early_stop=True, direction="maximize")
    for _ in range(3):
        found.ask()
    assert not found.is_hopeless(0, 100, 1.0)
    assert not found.is_hopeless(1, 100, 2.0)
    assert found.is_hopeless(2, 100, 0.5)
