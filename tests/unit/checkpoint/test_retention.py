"""The newest stay, every n-th, the best: of the whole ones. What is not kept goes after its successor stands."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_hydra.checkpoint import retention
from xtuner_hydra.checkpoint.commit import committed, step_of
from xtuner_hydra.config.schema import CheckpointConfig


def steps(parent):
    return [step_of(path) for path in committed(parent)]


def save(parent, step, config, **evaluation):
    """What a saver does to the directory."""
    path = make_checkpoint(parent, step, **evaluation)
    retention.tidy(parent, config, path)
    return path


@pytest.mark.parametrize(("keep", "expected"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(tmp_path, keep, expected):
    for step in range(1, 6):
        save(tmp_path, step, CheckpointConfig(keep=keep))
    assert sorted(os.listdir(tmp_path)) == [f"step-{step}" for step in expected]


def test_an_old_one_goes_only_after_the_new_one_stands(tmp_path, monkeypatch):
    save(tmp_path, 1, CheckpointConfig(keep=1))
    rmtree, seen = shutil.rmtree, []

    def watch(path, **options):
        if path.name == ".step-1.old" and path.exists():
            seen.append(steps(tmp_path))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watch)
    save(tmp_path, 2, CheckpointConfig(keep=1))
    assert seen == [[2]]  # out of the way first: half deleted it must not look whole
    assert os.listdir(tmp_path) == ["step-2"]


@pytest.mark.parametrize(("keep", "expected"), [(1, [12]), (2, [12, 16]), (3, [8, 12, 16])])
def test_the_one_just_saved_stays_even_where_later_ones_were_left_by_a_run_that_went_further(tmp_path, keep, expected):
    for step in (8, 16):
        make_checkpoint(tmp_path, step)
    save(tmp_path, 12, CheckpointConfig(keep=keep))
    assert steps(tmp_path) == expected


def test_every_nth_stays_for_good(tmp_path):
    for step in range(2, 17, 2):
        save(tmp_path, step, CheckpointConfig(keep=1, keep_every=6))
    assert steps(tmp_path) == [6, 12, 16]


def test_the_best_stays_until_a_better_one_comes(tmp_path):
    config, standing = CheckpointConfig(keep=1, keep_best="eval/loss"), []
    for step, loss in enumerate([3.0, 2.0, 2.5, None, 2.2, 1.0], start=1):
        save(tmp_path, step, config, **({} if loss is None else {"eval_loss": loss}))
        standing.append(steps(tmp_path))
    assert standing == [[1], [2], [2, 3], [2, 4], [2, 5], [6]]


def test_of_equally_good_ones_the_oldest_is_the_best(tmp_path):
    paths = [make_checkpoint(tmp_path, step, eval_loss=loss) for step, loss in ((1, 2.0), (2, 1.5), (3, 1.5))]
    assert retention.best_of(paths, "eval/loss") == paths[1]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    paths = [make_checkpoint(tmp_path, step, eval_loss=loss) for step, loss in ((1, float("nan")), (2, float("-inf")), (3, 1.5))]
    assert retention.best_of(paths, "eval/loss") == paths[2]
    assert retention.best_of(paths[:2], "eval/loss") is None


def test_the_metric_that_is_named_counts(tmp_path):
    paths = [
        make_checkpoint(tmp_path, 1, eval_loss=1.0, eval_perplexity=9.0),
        make_checkpoint(tmp_path, 2, eval_loss=2.0, eval_perplexity=3.0),
    ]
    assert (retention.best_of(paths, "eval/loss"), retention.best_of(paths, "eval/perplexity")) == tuple(paths)


def test_damaged_ones_do_not_count_and_are_not_removed(tmp_path):
    for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0)):
        make_checkpoint(tmp_path, step, eval_loss=loss)
    (tmp_path / "step-3" / "rank-0.safetensors").unlink()
    assert retention.tidy(tmp_path, CheckpointConfig(keep=1, keep_best="eval/loss")) == []
    assert steps(tmp_path) == [1, 2]
    assert (tmp_path / "step-3").exists()


def test_a_state_that_cannot_be_read_is_no_reason_to_fail(tmp_path):
    """The sizes agree, so it passes for whole; what it was evaluated to is not known."""
    path = make_checkpoint(tmp_path, 1, eval_loss=0.1)
    (path / "state.json").write_text("x" * (path / "state.json").stat().st_size)
    save(tmp_path, 2, CheckpointConfig(keep=1, keep_best="eval/loss"), eval_loss=1.0)
    assert steps(tmp_path) == [2]


def test_leftovers_of_interrupted_saves_and_removals_go(tmp_path):
    for name in (".step-3.tmp", ".step-1.old", "notes", ".step-x"):
        (tmp_path / name).mkdir()
    path = make_checkpoint(tmp_path, 5)
    gone = retention.tidy(tmp_path, CheckpointConfig(), path)
    assert {path.name for path in gone} == {".step-3.tmp", ".step-1.old"}
    assert sorted(os.listdir(tmp_path)) == [".step-x", "notes", "step-5"]


@settings(max_examples=60, deadline=None)
@given(
    found=st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([None, 1.0, 2.0, 3.0, float("nan")]), st.booleans()),
        min_size=1,
        max_size=7,
        unique_by=lambda one: one[0],
    ),
    keep=st.integers(1, 4),
    every=st.sampled_from([None, 2, 5]),
    best=st.sampled_from([None, "eval/loss"]),
)
def test_the_newest_whole_ones_always_stay_and_no_more_than_there_is_a_reason_for(found, keep, every, best):
    with TemporaryDirectory() as directory:
        parent = Path(directory)
        for step, loss, is_whole in found:
            path = make_checkpoint(parent, step, **({} if loss is None else {"eval_loss": loss}))
            if not is_whole:
                (path / "manifest.json").unlink()
        whole = sorted(step for step, _, is_whole in found if is_whole)
        retention.tidy(parent, CheckpointConfig(keep=keep, keep_every=every, keep_best=best))
        left = steps(parent)
    losses = {step: loss for step, loss, is_whole in found if is_whole and loss is not None and loss == loss}
    newest = set(whole[-keep:])
    others = set(left) - newest
    assert newest <= set(left)
    assert {step for step in whole if every and step % every == 0} <= set(left)
    not_every = {step for step in others if not (every and step % every == 0)}
    assert len(not_every) <= (best is not None)  # at most the best one
    assert all(losses[step] == min(losses.values()) for step in not_every)
    if best and losses:
        assert min(losses.values()) in [losses.get(step) for step in left]
