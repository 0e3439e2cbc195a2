"""What a sweep's directory says: jobs, settings, the best one, and whether the comparison is fair."""

import json

import pytest
from runs import finished, make_sweep

from xtuner_hydra import run_dir
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.results.sweep import SweepPlan, read_sweep

LR, SEED = "optimizer.lr", "trainer.seed"


def test_a_plan_comes_back_as_it_was_saved(tmp_path):
    make_sweep(tmp_path / "sweep", [({LR: 1e-4, SEED: 0}, None)])
    plan = SweepPlan.load(tmp_path / "sweep")
    plan.save(tmp_path)
    assert SweepPlan.load(tmp_path) == plan
    assert plan.swept == [LR, SEED]


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"not a sweep.*sweep\.json"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", '"abc"', '{"jobs": null}', '{"jobs": [{"name": "x"}]}', '{"jobs": [], "new": 1}', "\udcff"]
)
def test_a_file_of_another_shape_is_refused_like_none(tmp_path, content):
    (tmp_path / "sweep.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RefusedError, match=r"not a sweep.*sweep\.json"):
        read_sweep(tmp_path)


def test_a_job_that_ended_in_nan_has_no_value_whatever_it_had_before(tmp_path):
    make_sweep(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, finished(1.0))])
    job = read_sweep(tmp_path).jobs[1]
    rows = (tmp_path / job.name / "metrics.jsonl").read_text()
    null = json.dumps({**json.loads(rows.splitlines()[-1]), "eval/loss": None})
    (tmp_path / job.name / "metrics.jsonl").write_text(f"{rows}{null}\n")
    result = read_sweep(tmp_path)
    assert (result.best_job.number, result.jobs[1].value) == (0, None)


@pytest.mark.parametrize(("name", "content"), [("config.yaml", "model: {"), ("metrics.jsonl", "garbage\n")])
def test_a_job_that_cannot_be_read_costs_the_others_nothing(tmp_path, name, content):
    make_sweep(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, finished(1.0))])
    (tmp_path / read_sweep(tmp_path).jobs[1].name / name).write_text(content)
    result = read_sweep(tmp_path)
    assert (result.best_job.number, result.jobs[1].state) == (0, "damaged")
    assert name in result.jobs[1].error


def test_a_job_that_waits_stands_with_the_jobs_that_differ_in_the_seed(tmp_path):
    """Though its values are texts and theirs are numbers."""
    result = read_sweep(
        make_sweep(tmp_path, [({LR: 1e-4, SEED: 0}, None), ({LR: 1e-4, SEED: 1}, finished(2.0)), ({LR: 2e-4, SEED: 0}, None)])
    )
    assert [[job.number for job in setting.jobs] for setting in result.settings] == [[0, 1], [2]]
    assert [setting.swept for setting in result.settings] == [{LR: 1e-4}, {LR: 2e-4}]
    assert [job.state for job in result.jobs] == ["waiting", "completed", "waiting"]


def test_settings_are_ranked_by_their_mean_over_seeds(tmp_path):
    jobs = [({LR: 1e-4, SEED: 0}, finished(1.0)), ({LR: 1e-4, SEED: 1}, finished(3.0)), ({LR: 2e-4, SEED: 0}, finished(1.5))]
    result = read_sweep(make_sweep(tmp_path, jobs))
    assert result.best_setting.swept == {LR: 2e-4}
    assert result.best_job.number == 0
    assert (result.settings[1].mean, result.settings[1].spread) == (2.0, pytest.approx(2**0.5))


def test_a_seed_counts_once_and_its_last_job_wins(tmp_path):
    """Whether it was swept or stands in the config of the runs."""
    swept = [({LR: 1e-4, SEED: 0}, finished(1.0)), ({LR: 1e-4, SEED: 1}, finished(3.0)), ({LR: 1e-4, SEED: 0}, finished(2.0))]
    (setting,) = read_sweep(make_sweep(tmp_path / "swept", swept)).settings
    assert (setting.values, setting.seeds, len(setting.jobs)) == ([2.0, 3.0], 2, 3)
    fixed = [({LR: 1e-4}, finished(2.0)), ({LR: 1e-4}, finished(2.0)), ({LR: 1e-4}, None)]
    (setting,) = read_sweep(make_sweep(tmp_path / "fixed", fixed)).settings
    assert (setting.values, setting.seeds, setting.spread) == ([2.0], 1, None)


def test_to_maximize_turns_the_ranking_round(tmp_path):
    result = read_sweep(make_sweep(tmp_path, [({LR: 1e-4}, finished(1.0)), ({LR: 2e-4}, finished(3.0))], direction="maximize"))
    assert result.best_job.number == result.best_setting.jobs[0].number == 1


def test_a_job_that_was_refused_before_it_had_files_has_failed(tmp_path):
    make_sweep(tmp_path, [({LR: 1e-4}, None)])
    (tmp_path / "0_job").mkdir()
    run_dir.write_status(tmp_path / "0_job", "failed", exit_code=2, error="data.path: gone")
    (job,) = read_sweep(tmp_path).jobs
    assert (job.run, job.state, job.error, job.value) == (None, "failed", "data.path: gone", None)


def test_a_run_that_is_just_being_created_waits(tmp_path):
    make_sweep(tmp_path, [({LR: 1e-4}, finished(1.0))])
    (tmp_path / "0_job" / "status.json").unlink()
    assert [job.state for job in read_sweep(tmp_path).jobs] == ["waiting"]


@pytest.mark.parametrize(
    ("first", "second", "doubt"),
    [
        (finished(1.0), finished(2.0), None),
        (finished(1.0), finished(2.0, tokens=600), "different held-out tokens (500 to 600"),
        (finished(1.0), finished(2.0, steps=9), "different numbers of tokens (300 to 900"),
        (finished(1.0), {"rows": [], "state": "failed"}, "Of 2 jobs 1 failed"),
    ],
)
def test_doubts_are_named(tmp_path, first, second, doubt):
    doubts = read_sweep(make_sweep(tmp_path, [({LR: 1e-4}, first), ({LR: 2e-4}, second)])).doubts
    assert len(doubts) == (doubt is not None)
    assert all(doubt in text for text in doubts)


def test_other_tokens_of_the_same_held_out_text_are_told_from_other_text(tmp_path):
    sweep = make_sweep(tmp_path, [({LR: 1e-4}, finished(1.0)), ({LR: 2e-4}, finished(2.0, tokens=600))])
    for number, fingerprint in enumerate("ab"):
        (sweep / f"{number}_job" / "data.json").write_text(json.dumps({"eval": {"hashes": ["h"], "fingerprint": fingerprint}}))
    (doubt,) = read_sweep(sweep).doubts
    assert "was tokenised differently (500 to 600" in doubt


def test_seeds_may_differ_in_their_tokens_where_settings_do_not(tmp_path):
    """A seed shuffles and packs the data its own way, and may choose what is held out."""
    lengths = {0: {"steps": 3, "tokens": 500}, 1: {"steps": 9, "tokens": 600}}
    jobs = [({LR: lr, SEED: seed}, finished(1.0 + lr, **lengths[seed])) for lr in (0.1, 0.2) for seed in (0, 1)]
    assert read_sweep(make_sweep(tmp_path / "settings", jobs)).unfair == []
    assert read_sweep(make_sweep(tmp_path / "seeds alone", jobs[:2])).unfair == []


def test_a_key_zipped_with_the_seed_is_doubted(tmp_path):
    jobs = [({LR: 1e-4, SEED: 0}, finished(1.0)), ({LR: 2e-4, SEED: 1}, finished(2.0))]
    (doubt,) = read_sweep(make_sweep(tmp_path / "zip", jobs)).doubts
    assert "different seeds" in doubt
    assert read_sweep(make_sweep(tmp_path / "grid", [*jobs, ({LR: 2e-4, SEED: 0}, finished(2.0))])).doubts == []
    assert read_sweep(make_sweep(tmp_path / "nothing", [({LR: 1e-4}, None)])).unfair == []


def test_a_loss_that_is_no_number_is_no_value(tmp_path):
    result = read_sweep(make_sweep(tmp_path, [({LR: 1e-4}, finished(2.0)), ({LR: 2e-4}, {"rows": [{"train/step": 1, "eval/loss": None}]})]))
    assert [job.value for job in result.jobs] == [2.0, None]
    assert result.best_job.number == 0


def test_without_metrics_jsonl_the_last_status_counts(tmp_path):
    make_sweep(tmp_path, [({LR: 1e-4}, finished(2.0))])
    (tmp_path / "0_job" / "metrics.jsonl").unlink()
    (job,) = read_sweep(tmp_path).jobs
    assert (job.value, job.run.step) == (2.0, 3)
