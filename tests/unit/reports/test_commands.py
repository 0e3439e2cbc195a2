"""The commands that a report gives can be typed as they stand."""

import shlex

import pytest
from runs import finished, make_sweep

from xtuner_hydra.reports import commands
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.results.sweep import read_sweep

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


def test_the_refinement_fixes_words_varies_numbers_and_leaves_seeds_out(tmp_path):
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
    assert set(words[5:]) == {"scheduler.name=cosine", f"{LR}=2.4e-5,6e-5,0.00011", f"{PACK}=1536,2048,4096"}
    assert count == 9


def test_a_large_refinement_keeps_to_the_keys_that_matter(tmp_path):
    keys = [LR, "optimizer.weight_decay", "optimizer.eps", "scheduler.lr_min"]
    jobs = [({key: (n + 2 + i) * 1e-5 for i, key in enumerate(keys)}, finished(float(n))) for n in range(3)]
    command, count = Findings(read_sweep(make_sweep(tmp_path, jobs))).refine
    assert count == 27
    assert sum("," in word for word in command.split()) == 3


def test_without_numbers_there_is_nothing_to_refine(tmp_path):
    jobs = [({"scheduler.name": name}, finished(1.0)) for name in ("cosine", "linear")]
    assert Findings(read_sweep(make_sweep(tmp_path, jobs))).refine is None
