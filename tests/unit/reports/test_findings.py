"""The sentences of a report say what the numbers say."""

import math
from statistics import stdev

import numpy as np
import pytest
from runs import finished, make_sweep

from xtuner_hydra.reports.findings import Findings, enough
from xtuner_hydra.results.sweep import read_sweep

LR, PACK, SEED = "optimizer.lr", "data.pack_max_length", "trainer.seed"


def findings(directory, jobs, **options):
    return Findings(read_sweep(make_sweep(directory, jobs, **options)))


def seeds(lr, *losses):
    return [({LR: lr, SEED: seed}, finished(loss)) for seed, loss in enumerate(losses)]


def test_a_clear_winner(tmp_path):
    found = findings(tmp_path, seeds(1e-4, 2.0, 2.01, 1.99) + seeds(2e-4, 3.0, 3.01, 2.99))
    assert found.answer == "lr 1e-4 wins: eval/loss 2.000 ± 0.010 over 3 seeds, 1.000 below the next (lr 2e-4)."
    assert found.verdict == "clear"
    assert found.noise == pytest.approx(stdev([2.0, 2.01, 1.99]))
    assert "100.0 times the seed spread" in found.verdict_text


def test_what_is_within_chance_is_no_win(tmp_path):
    found = findings(tmp_path, seeds(1e-4, 2.0, 2.4) + seeds(2e-4, 2.1, 2.5))
    assert found.verdict == "chance"
    assert found.answer.startswith("lr 1e-4 and lr 2e-4 cannot be told apart: eval/loss 2.200 ± 0.283 against 2.300")


def test_two_seeds_need_a_wider_lead_than_many(tmp_path):
    """The same lead in the same spread: t is 4.24 with 2 degrees of freedom, which p = 0.05 needs 4.30 for, and 9.5 with 8."""
    few = findings(tmp_path / "few", seeds(1e-4, 2.0, 2.1) + seeds(2e-4, 2.3, 2.4))
    many = findings(tmp_path / "many", seeds(1e-4, 2.0, 2.1, 2.05, 2.0, 2.1) + seeds(2e-4, 2.3, 2.4, 2.35, 2.3, 2.4))
    assert (few.verdict, many.verdict) == ("unsure", "clear")


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 15, 30, 200])
def test_the_table_is_students(freedom):
    """Against the density, integrated: 97.5 % lie below."""
    x = np.linspace(0, enough(freedom), 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    below = 0.5 + np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert below == pytest.approx(0.975, abs=0.0004)


def test_one_seed_says_nothing_about_chance(tmp_path):
    found = findings(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, finished(3.0))])
    assert found.verdict == "unknown"
    assert "chance is not ruled out" in found.verdict_text


def test_while_jobs_are_to_come_it_leads(tmp_path):
    found = findings(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, finished(3.0)), ({LR: 3e-4}, None)], total=4, state="running")
    assert found.answer.startswith("lr 1e-4 leads so far")
    assert found.standing == "4 jobs: 2 completed, 1 waiting, 1 to come; 1 min 30 s"


def test_the_key_that_moves_the_metric_most_comes_first(tmp_path):
    jobs = [({PACK: pack, LR: lr}, finished(lr * 1e4 + pack / 1000)) for pack in (100, 200) for lr in (1e-4, 2e-4)]
    found = findings(tmp_path, jobs)
    assert found.telling_keys == [LR, PACK]
    assert found.effects_text == "lr moves eval/loss by 1.00, pack_max_length by 0.10."


def test_in_a_random_search_thirds_stand_for_values(tmp_path):
    jobs = [({LR: 1e-4 * (n + 1), "optimizer.eps": ((n * 5) % 12 + 1) * 1e-8}, finished(2.0 + n)) for n in range(12)]
    found = findings(tmp_path, jobs)
    assert found.telling_keys[0] == LR
    assert found.effects[0].size == pytest.approx(8.0)  # thirds of four: means 1.5 and 9.5 apart from 2


def test_nothing_and_failures_only(tmp_path):
    waiting = findings(tmp_path / "a", [({LR: 1e-4}, None)])
    failed = findings(tmp_path / "b", [({LR: 1e-4}, {"rows": [], "state": "failed"})])
    assert waiting.answer == "No job has completed yet."
    assert failed.answer == "No job has completed, so there is no ranking."
    assert (failed.repeat, failed.refine, failed.lead) == (None, None, None)


def test_far_off_values_do_not_squeeze_the_others(tmp_path):
    found = findings(tmp_path, [({LR: 1e-4 * n}, finished(loss)) for n, loss in enumerate([1.0, 1.1, 1.2, 500.0], 1)])
    assert found.metric_range[1] < 2
    assert [round(found.goodness(setting), 1) for setting in found.settings] == pytest.approx([1.0, 0.8, 0.7, 0.0], abs=0.11)
