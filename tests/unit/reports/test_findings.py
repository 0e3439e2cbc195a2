"""The sentences of a report say what the numbers say."""

from statistics import stdev

import pytest
from runs import evaluation, finished, make_sweep, step

from xtuner_hydra.reports.findings import Findings, changes_speed
from xtuner_hydra.reports.tables import ranking
from xtuner_hydra.results.sweep import read_sweep

LR, PACK, SEED = "optimizer.lr", "data.pack_max_length", "trainer.seed"


def findings(directory, jobs, **options):
    return Findings(read_sweep(make_sweep(directory, jobs, **options)))


def seeds(lr, *losses):
    return [({LR: lr, SEED: seed}, finished(loss)) for seed, loss in enumerate(losses)]


def test_a_clear_winner(tmp_path):
    found = findings(tmp_path, seeds(1e-4, 2.0, 2.01, 1.99) + seeds(2e-4, 3.01, 3.0, 2.99))
    assert found.answer == "lr 1e-4 wins: eval/loss 2.000 ± 0.010 over 3 seeds, 1.000 below the next (lr 2e-4)."
    assert found.verdict == "clear"
    assert found.noise == pytest.approx(stdev([2.0, 2.01, 1.99]))
    assert found.verdict_text == "Ahead on all 3 seeds, by 1.00 ± 0.01: not chance."


def test_seeds_that_settings_share_are_compared_one_by_one(tmp_path):
    """Seeds that differ by far more than the settings do hide no lead that each of them shows."""
    found = findings(tmp_path, seeds(1e-4, 2.0, 2.4, 2.9) + seeds(2e-4, 2.044, 2.451, 2.958))
    assert found.verdict == "clear"
    assert found.answer.startswith("lr 1e-4 wins")
    assert found.verdict_text == "Ahead on all 3 seeds, by 0.051 ± 0.007: not chance."
    assert dict(found.basis)["chance is judged by"].startswith("the differences between first and second on the 3 seeds that both have")


def test_where_seeds_are_not_shared_the_pooled_spread_decides(tmp_path):
    jobs = seeds(1e-4, 2.0, 2.1) + [({LR: 2e-4, SEED: seed}, finished(loss)) for seed, loss in ((5, 3.0), (6, 3.1))]
    found = findings(tmp_path, jobs)
    assert found.verdict == "clear"
    assert found.verdict_text == "1.000 between first and second, 14.1 times the seed spread of 0.071: not chance."


def test_what_is_within_chance_is_no_win(tmp_path):
    found = findings(tmp_path, seeds(1e-4, 2.0, 2.4) + seeds(2e-4, 2.4, 2.2))
    assert found.verdict == "chance"
    assert found.answer.startswith("lr 1e-4 and lr 2e-4 cannot be told apart: eval/loss 2.200 ± 0.283 against 2.300")
    assert found.verdict_text == "Ahead on 1 of 2 seeds, by 0.10 ± 0.42: within chance. More seeds would tell."


def test_two_seeds_need_a_wider_lead_than_many(tmp_path):
    """The same lead in nearly the same spread: t is 3.0 with 1 degree of freedom, which p = 0.05 needs 12.7 for, and 6.7 with 4."""
    few = findings(tmp_path / "few", seeds(1e-4, 2.0, 2.1) + seeds(2e-4, 2.4, 2.3))
    many = findings(tmp_path / "many", seeds(1e-4, 2.0, 2.1, 2.05, 2.0, 2.1) + seeds(2e-4, 2.4, 2.3, 2.35, 2.4, 2.3))
    assert (few.verdict, many.verdict) == ("unsure", "clear")
    assert few.answer.startswith("lr 1e-4 leads: eval/loss")
    assert "Ahead on both seeds" in few.verdict_text


def test_the_same_lead_on_every_seed_is_clear_and_finite(tmp_path):
    found = findings(tmp_path, seeds(1e-4, 2.0, 2.3) + seeds(2e-4, 2.1, 2.4))
    assert found.verdict_text == "Ahead on both seeds, by 0.100 on each: not chance."


def test_values_that_differ_by_little_or_by_all_are_told(tmp_path):
    little = findings(tmp_path / "a", seeds(1e-4, 2.0, 2.5, 3.0) + seeds(2e-4, 2.0 + 1e-7, 2.5 + 1.1e-7, 3.0 + 1e-7))
    assert little.verdict_text.startswith("Ahead on all 3 seeds, by 1e-7 ± 6e-9")
    diverged = findings(tmp_path / "b", seeds(1e-4, 2.0, 1.0) + seeds(1.0, 1e228, 1e126))
    assert diverged.answer.startswith("lr 1e-4 ")
    assert diverged.noise > 1e227


def test_lists_and_paths_that_differ_at_their_ends_are_two_settings(tmp_path):
    start = "/data/corpora_2026/english/part-a.jsonl,/data/corpora_2026/english/part-b.jsonl"
    files = [[*start.split(","), f"/data/x/{name}.jsonl"] for name in ("q1", "q2")]
    found = findings(tmp_path, [({"data.path": path, LR: lr}, finished(2.0 + lr)) for path in files for lr in (1e-4, 1e-3)])
    assert set(found.keys) == {"data.path", LR}
    assert [found.text("data.path", path) for path in files] == ["…q1.jsonl", "…q2.jsonl"]
    assert len({tuple(line[1:3]) for line in ranking(found)[1:]}) == 4


def test_equal_settings_tie(tmp_path):
    jobs = [({LR: lr}, finished(6.265072035969525)) for lr in (1e-4, 2e-4)] + [({LR: 3e-4}, finished(7.0))]
    found = findings(tmp_path / "one", jobs)
    assert found.answer == "lr 1e-4 and lr 2e-4 tie: eval/loss 6.265."
    rounding = findings(tmp_path / "seeds", seeds(1e-4, 2.0, 3.0) + seeds(2e-4, 2.0 + 1e-12, 3.0 + 1e-12))
    assert (rounding.verdict, rounding.verdict_text) == ("tie", "First and second have the same value.")


def test_a_setting_on_its_own_does_not_win(tmp_path):
    assert findings(tmp_path / "seeds", seeds(1e-4, 2.0, 3.0)).answer == "lr 1e-4: eval/loss 2.500 ± 0.707 over 2 seeds."
    alone = [({SEED: seed}, finished(2.0 + seed)) for seed in (0, 1)]
    assert findings(tmp_path / "nothing swept", alone).answer == "eval/loss 2.500 ± 0.707 over 2 seeds."
    others = [({LR: 1e-4}, finished(2.0)), ({LR: 1.0}, {"rows": [], "state": "failed"})]
    assert findings(tmp_path / "failed", others).answer == "lr 1e-4 is the only one that completed: eval/loss 2.000."


def test_jobs_whose_metric_was_lost_have_completed_all_the_same(tmp_path):
    lost = {"rows": [step(1, 3.0), evaluation(1, None)]}
    none = findings(tmp_path / "none", [({LR: 1e-4}, lost), ({LR: 1e-3}, lost)])
    assert (none.answer, none.result.doubts) == ("No job ended with a finite eval/loss, so there is no ranking.", [])
    one = findings(tmp_path / "one", [({LR: 1e-4}, finished(2.0)), ({LR: 1e-3}, lost)])
    assert one.answer == "lr 1e-4 is the only one with a finite eval/loss: eval/loss 2.000."
    assert one.result.doubts == ["Of 2 jobs 1 completed without a finite eval/loss; the ranking is of the others."]


def test_a_job_that_cannot_be_read_is_told(tmp_path):
    make_sweep(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 1e-3}, finished(3.0))])
    (tmp_path / "1_job" / "metrics.jsonl").write_bytes(b"\0\0\0\n")
    found = Findings(read_sweep(tmp_path))
    assert found.standing.startswith("2 jobs: 1 completed, 1 damaged")
    assert found.result.doubts == ["Of 2 jobs 1 cannot be read; the ranking is of the others."]
    assert ["cannot be read" in job.error for job in found.failures] == [True]


def test_the_same_seed_again_is_no_further_seed(tmp_path):
    """A bit-exact rerun neither narrows the spread nor counts."""
    jobs = [*seeds(1e-4, 2.0, 2.2), ({LR: 1e-4, SEED: 1}, finished(2.2)), *seeds(2e-4, 3.0, 3.3)]
    found = findings(tmp_path, jobs)
    assert "over 2 seeds" in found.answer
    assert found.best.spread == pytest.approx(stdev([2.0, 2.2]))


def test_one_seed_says_nothing_about_chance(tmp_path):
    found = findings(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, finished(3.0))])
    assert found.verdict == "unknown"
    assert found.answer.startswith("lr 1e-4 leads: eval/loss 2.00")
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


@pytest.mark.parametrize(("state", "why"), [("failed", "ended by a failure"), ("interrupted", "interrupted")])
def test_a_sweep_that_ended_before_any_job_did_says_why(tmp_path, state, why):
    found = findings(tmp_path, [({LR: 1e-4}, {"rows": [], "state": state}), ({LR: 2e-4}, None)], state=state)
    assert found.answer == f"The sweep was {why} before any job completed."


def test_what_was_stopped_early_is_part_of_the_answer(tmp_path):
    def stopped(loss):
        return {"rows": [step(1, 4.0), evaluation(1, loss)], "state": "interrupted", "pruned": "hopeless"}

    jobs = [
        ({LR: 1e-5}, stopped(3.5)),
        ({LR: 1e-4}, finished(2.0)),
        ({LR: 2e-4}, stopped(2.1)),
        ({LR: 3e-4}, finished(2.4)),
        ({LR: 1.0}, None),
    ]
    found = findings(tmp_path, jobs)
    assert "0.400 below the next that ran to its end (lr 3e-4)" in found.answer
    assert [setting.swept[LR] for setting in found.settings] == [1e-4, 3e-4, 2e-4, 1e-5, 1.0]
    assert [line[1:3] + line[-1:] for line in ranking(found)[3:5]] == [
        ["2e-4", "2.100", "stopped early at 100 tokens"],
        ["1e-5", "3.500", "stopped early at 100 tokens"],
    ]
    assert [found.rank(setting) for setting in found.settings] == [1, 2, None, None, None]
    worse = findings(tmp_path / "worse", jobs[:2] + jobs[3:])
    assert "ran to its end" not in worse.answer


@pytest.mark.parametrize(
    ("key", "values", "times", "faster"),
    [
        (PACK, (64, 128), 1.84, True),
        (PACK, (64, 128), 1.08, False),
        (LR, (1e-4, 2e-4), 1.84, False),
        ("scheduler.name", ("cosine", "linear"), 1.84, False),
        ("model.tokenizer", ("a", "b"), 1.84, True),
    ],
)
def test_only_a_key_that_can_change_speed_is_said_to(tmp_path, key, values, times, faster):
    slow, fast = finished(2.0), finished(3.0)
    fast["rows"][-2]["throughput/e2e_tgs"] = 100.0 * times
    found = findings(tmp_path, [({key: values[0]}, slow), ({key: values[1]}, fast)])
    assert (found.faster() is not None) == faster
    assert not faster or found.faster()[1] == pytest.approx(times)
    assert [changes_speed(key) for key in ("optimizer.name", "optimizer.eps", SEED)] == [True, False, False]
