"""A checkpoint exists when it is committed and not before; no crash, wherever it comes, takes the last good one away."""

import json
import os
import shutil

import pytest
import torch.distributed as dist
from ranks import run_on_ranks

from xtuner_hydra.checkpoint.commit import commit, committed, damage


class Crash(BaseException):
    """The end of a process, as far as the code under it can tell."""


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def writer(content):
    """A `write` that leaves two files, one of them in a directory."""

    def write(staging):
        (staging / "part").mkdir()
        (staging / "part" / "weights").write_text(content)
        (staging / "state").write_text(content)

    return write


def save(parent, step, *, keep=2, content=None):
    return commit(parent / f"step-{step}", writer(content or f"content of {step}"), keep=keep)


def steps(parent):
    return [int(path.name.partition("-")[2]) for path in committed(parent)]


def test_what_is_written_stands_under_its_name_with_a_manifest_of_sizes(tmp_path):
    path = save(tmp_path, 7, content="weights")
    assert path == tmp_path / "step-7"
    assert os.listdir(tmp_path) == ["step-7"]
    assert json.loads((path / "manifest.json").read_text())["files"] == {"part/weights": 7, "state": 7}
    assert damage(path) is None


def test_committed_ones_come_in_the_order_of_their_numbers(tmp_path):
    for step in (100, 9, 20):
        save(tmp_path, step, keep=9)
    assert steps(tmp_path) == [9, 20, 100]


def test_where_nothing_was_saved_nothing_is_committed(tmp_path):
    assert committed(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    "error", [Crash(), OSError("No space left on device"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
def test_a_crash_while_writing_commits_nothing_and_leaves_the_old_ones(tmp_path, error):
    for step in (1, 2):
        save(tmp_path, step)

    def write(staging):
        (staging / "state").write_text("half")
        raise error

    with pytest.raises(type(error)):
        commit(tmp_path / "step-3", write, keep=2)
    assert steps(tmp_path) == [1, 2]
    assert not (tmp_path / "step-3").exists()
    assert (tmp_path / "step-2" / "state").read_text() == "content of 2"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_call_to_the_file_system_leaves_the_newest_old_one_or_the_new_one(tmp_path, monkeypatch, keep):
    """The saving process dies at its first call that changes or flushes a directory, at its second, and so on until it gets through."""
    calls = [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")]
    crashes = 0
    while True:
        parent = tmp_path / str(crashes)
        for step in (1, 2):
            save(parent, step, keep=keep)
        with monkeypatch.context() as patched:
            left = iter(range(crashes, -1, -1))
            for module, name in calls:
                patched.setattr(module, name, dying(getattr(module, name), left))
            try:
                save(parent, 3, keep=keep)
            except Crash:
                assert steps(parent)[-1] in (2, 3)
                assert (committed(parent)[-1] / "state").read_text() == f"content of {steps(parent)[-1]}"
            else:
                assert steps(parent) == [1, 2, 3][-keep:]
                break
        crashes += 1
        save(parent, 4, keep=keep)  # the next save gets through whatever the crash has left
        assert steps(parent)[-1] == 4
        assert len(steps(parent)) <= keep
    assert crashes > 8, "the places of the crashes have gone: look at `calls`"


def dying(function, left):
    def call(*args, **kwargs):
        if next(left, 0) == 0:
            raise Crash
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(("keep", "expected"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(tmp_path, keep, expected):
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
    assert steps(tmp_path) == expected
    assert sorted(os.listdir(tmp_path)) == [f"step-{step}" for step in expected]


def test_an_old_one_goes_only_after_the_new_one_stands(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    rmtree, seen = shutil.rmtree, []

    def watch(path, **options):
        if path.name == "step-1":
            seen.append(steps(tmp_path))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watch)
    save(tmp_path, 2, keep=1)
    assert seen == [[1, 2]]
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(("keep", "expected"), [(1, [12]), (2, [12, 16]), (3, [8, 12, 16])])
def test_the_one_just_saved_stays_even_where_later_ones_were_left_by_a_run_that_went_further(tmp_path, keep, expected):
    for step in (8, 16):
        save(tmp_path, step, keep=9)
    assert save(tmp_path, 12, keep=keep).exists()
    assert steps(tmp_path) == expected


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: (path / "state").unlink(), "state is missing"),
        (lambda path: (path / "part" / "weights").write_text("longer than it was before"), "part/weights has 25 bytes"),
        (lambda path: (path / "state").write_text(""), "state has 0 bytes"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"sta'), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json"),
    ],
)
def test_a_damaged_directory_is_not_committed(tmp_path, harm, words):
    save(tmp_path, 1)
    harm(save(tmp_path, 2))
    assert steps(tmp_path) == [1]
    assert words in damage(tmp_path / "step-2")


@pytest.mark.parametrize("name", ["step-", "step-x", "step-3.bak", "step--3", ".step-3.tmp"])
def test_other_names_are_no_checkpoints(tmp_path, name):
    save(tmp_path, 3).rename(tmp_path / name)
    assert committed(tmp_path) == []


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, content="before")
    save(tmp_path, 1, content="after, and longer")
    assert steps(tmp_path) == [1]
    assert (tmp_path / "step-1" / "state").read_text() == "after, and longer"


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    (save(tmp_path, 1) / "state").unlink()
    save(tmp_path, 1)
    assert steps(tmp_path) == [1]


def test_leftovers_of_a_crash_are_no_part_of_the_next_save(tmp_path):
    def write(staging):
        (staging / "leftover").write_text("x")
        raise Crash

    with pytest.raises(Crash):
        commit(tmp_path / "step-1", write, keep=1)
    assert os.listdir(tmp_path) == [".step-1.tmp"]
    save(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-1"]
    assert not (tmp_path / "step-1" / "leftover").exists()


def commit_on_a_rank(parent):
    """Both ranks write; then the second one fails, which must not leave the first one waiting for ever."""
    dist.init_process_group("gloo")

    def write(staging):
        (staging / f"rank{dist.get_rank()}").write_text("x")

    def fail(staging):
        write(staging)
        if dist.get_rank() == 1:
            raise OSError("No space left on device")

    commit(parent / "step-1", write, keep=1)
    try:
        commit(parent / "step-2", fail, keep=1)
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def test_ranks_commit_together_or_not_at_all(tmp_path):
    first, second = run_on_ranks(commit_on_a_rank, 2, tmp_path)
    assert first is not None
    assert second == "No space left on device"
    assert steps(tmp_path) == [1]
    assert set(json.loads((tmp_path / "step-1" / "manifest.json").read_text())["files"]) == {"rank0", "rank1"}
