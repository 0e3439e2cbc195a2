"""The commands that a report gives can be typed as they stand."""

import shlex

import pytest
from pages import check
from runs import finished, make_sweep, step

from xtuner_hydra.reports import commands, tables
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.reports.sweep_page import sweep_page
from xtuner_hydra.results.sweep import SweepPlan, read_sweep

LR, PACK, SEED = "optimizer.lr", "data.pack_max_length", "trainer.seed"


@pytest.mark.parametrize(
    ("best", "seen", "near"),
    [
        (6e-5, [1e-5, 6e-5, 2e-4], [2.4e-5, 6e-5, 1.1e-4]),
        (1e-5, [1e-5, 6e-5], [5e-6, 1e-5, 2.4e-5]),
        (6e-5, [1e-5, 6e-5], [2.4e-5, 6e-5, 1.2e-4]),
        (2048, [1024, 2048, 4096], [1536, 2048, 3072]),
        (1024, [1024, 2048], [512, 1024, 1536]),
        (1, [1, 2], [0, 1, 2]),
        ("cosine", ["cosine", "linear"], ["cosine"]),
        (True, [True, False], [True]),
        (0.0, [0.0, 0.1], [0.0]),
        (0.5, [0.5], [0.5]),
        (0.1, [0.0, 0.1, 0.4], [0.05, 0.1, 0.2]),
        (4.43e-4, [4.4e-4, 4.43e-4, 4.5e-4], [2.2e-4, 4.43e-4, 8.9e-4]),
        (4.43e-4, [1e-4, 4.4e-4, 4.43e-4], [2.1e-4, 4.43e-4, 8.9e-4]),
    ],
)
def test_values_around_the_best(best, seen, near):
    assert commands.around(best, seen) == pytest.approx(near)


def test_of_many_random_values_the_nearest_are_not_taken():
    seen = [1e-6 * 1.2**n for n in range(40)]
    low, best, high = commands.around(seen[20], seen)
    assert low < 0.7 * best < 1.4 * best < high


def test_the_best_job_is_repeated_with_all_its_overrides_but_those_of_the_sweep(tmp_path):
    run = finished(1.0, overrides=["debug=fast", f"{LR}=6e-05", "data.path=my chats.jsonl", "sweep.keep=all", "hydra/launcher=slots"])
    findings = Findings(read_sweep(make_sweep(tmp_path, [({LR: 1e-5}, finished(2.0)), ({LR: 6e-5}, run)])))
    words = shlex.split(findings.repeat)
    assert words == ["python", "-m", "xtuner_hydra", "debug=fast", f"{LR}=6e-05", "data.path=my chats.jsonl"]


def test_the_refinement_fixes_words_varies_numbers_and_keeps_the_seeds(tmp_path):
    jobs = [
        (
            {LR: lr, PACK: pack, "scheduler.name": name, SEED: 3},
            finished(abs(lr - 6e-5) * 1e4 + abs(pack - 2048) / 1e4 + (name == "linear")),
        )
        for lr in (1e-5, 6e-5, 2e-4)
        for pack in (1024, 2048)
        for name in ("cosine", "linear")
    ]
    command, count = Findings(read_sweep(make_sweep(tmp_path, jobs))).refine
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "xtuner_hydra", "-m", "debug=fast"]
    assert set(words[5:]) == {"scheduler.name=cosine", f"{LR}=2.4e-5,6e-5,0.00011", f"{PACK}=1536,2048,4096", f"{SEED}=3"}
    assert count == 9


@pytest.mark.parametrize(("number", "keys", "seeds", "count"), [(3, 3, 3, 27), (2, 1, 2, 6), (12, 1, 9, 27)])
def test_seeds_are_kept_while_the_jobs_are_not_too_many(tmp_path, number, keys, seeds, count):
    names = [LR, "optimizer.weight_decay", "optimizer.eps"][:keys]
    jobs = [({**{key: (n + 2) * 1e-5 for key in names}, SEED: seed}, finished(float(n))) for n in range(3) for seed in range(number)]
    command, jobs = Findings(read_sweep(make_sweep(tmp_path, jobs))).refine
    assert f"{SEED}={','.join(map(str, range(seeds)))}" in shlex.split(command)
    assert jobs == count


def test_a_large_refinement_keeps_to_the_keys_that_matter(tmp_path):
    keys = [LR, "optimizer.weight_decay", "optimizer.eps", "scheduler.lr_min"]
    jobs = [({key: (n + 2 + i) * 1e-5 for i, key in enumerate(keys)}, finished(float(n))) for n in range(3)]
    command, count = Findings(read_sweep(make_sweep(tmp_path, jobs))).refine
    assert count == 27
    assert sum("," in word for word in command.split()) == 3


def test_without_numbers_there_is_nothing_to_refine(tmp_path):
    jobs = [({"scheduler.name": name}, finished(1.0)) for name in ("cosine", "linear")]
    assert Findings(read_sweep(make_sweep(tmp_path, jobs))).refine is None


@pytest.mark.parametrize("state", ["failed", "interrupted", None])
def test_what_is_left_comes_first(tmp_path, state):
    """Whether it failed, was interrupted or waits."""
    left = state and {"rows": [], "state": state}
    make_sweep(tmp_path / "my sweep", [({LR: 1e-5}, finished(2.0)), ({LR: 6e-5}, left)], state="failed")
    found = Findings(read_sweep(tmp_path / "my sweep"))
    what, command = found.next[0]
    assert what == "Run what is missing, failed or interrupted"
    assert shlex.split(command) == ["python", "-m", "xtuner_hydra", f"sweep.resume={tmp_path / 'my sweep'}"]
    text, page = tables.markdown(found), check(sweep_page(found)).words
    assert 0 < text.index("sweep.resume=") < text.index("Repeat the best")
    assert 0 < page.index("sweep.resume=") < page.index("Repeat the best")


def test_a_running_sweep_is_gone_on_with_only_if_it_stops(tmp_path):
    found = Findings(read_sweep(make_sweep(tmp_path, [({LR: 1e-5}, None)], state="running")))
    assert [what for what, _ in found.next] == ["If the sweep is stopped, continue it"]


def test_a_whole_sweep_is_not_gone_on_with(tmp_path):
    pruned = {"rows": [step(1, 3.0)], "state": "interrupted", "pruned": "hopeless"}
    found = Findings(read_sweep(make_sweep(tmp_path, [({LR: 1e-5}, finished(2.0)), ({LR: 6e-5}, pruned)])))
    assert not any("resume" in command for _, command in found.next)


def test_a_refinement_stays_in_the_range_of_its_keys(tmp_path):
    """Twice a momentum of 0.95 would be refused."""
    momentum = "optimizer.momentum"
    jobs = [({momentum: value}, finished(1 - value)) for value in (0.8, 0.9, 0.95)]
    command, _ = Findings(read_sweep(make_sweep(tmp_path, jobs))).refine
    (values,) = (word.partition("=")[2].split(",") for word in shlex.split(command) if word.startswith(momentum))
    assert all(0 <= float(value) < 1 for value in values)
    assert len(values) > 1


def test_a_refinement_leaves_groups_as_they_are(tmp_path):
    """Which are no keys of the config."""
    rates = (0.1, 0.2, 0.1, 0.2)
    sweep = make_sweep(tmp_path, [({LR: rate}, finished(rate)) for rate in rates])
    plan = SweepPlan.load(sweep)
    for job, name in zip(plan.jobs, "aabb", strict=True):
        job.overrides = [f"experiment={name}", *job.overrides]
    plan.swept = ["experiment", LR]
    plan.save(sweep)
    result = read_sweep(sweep)
    command, _ = commands.refine(result, result.best_job, ["experiment", LR])
    assert f"{LR}=0.05,0.1,0.14" in command
