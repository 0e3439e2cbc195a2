"""A checkpoint exists when it is committed and not before; no crash, wherever it comes, takes the last good one away."""

import errno
import json
import os
import shutil
import zlib

import pytest
import torch.distributed as dist
from ranks import run_on_ranks

from xtuner_hydra.checkpoint import retention
from xtuner_hydra.checkpoint.commit import commit, committed, damage, has_saved, put_back
from xtuner_hydra.config.schema import CheckpointConfig
from xtuner_hydra.errors import SaveError
from xtuner_hydra.files import checksum


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
    """Commit a step and tidy up, as a saver does."""
    path = commit(parent / f"step-{step}", writer(content or f"content of {step}"))
    retention.tidy(parent, CheckpointConfig(keep=keep), path)
    return path


def steps(parent):
    return [int(path.name.partition("-")[2]) for path in committed(parent)]


def test_what_is_written_stands_under_its_name_with_a_manifest_of_sizes_and_checksums(tmp_path):
    path = save(tmp_path, 7, content="weights")
    assert path == tmp_path / "step-7"
    assert os.listdir(tmp_path) == ["step-7"]
    entry = {"size": 7, "crc32": f"{zlib.crc32(b'weights'):08x}"}
    assert json.loads((path / "manifest.json").read_text()) == {"name": "step-7", "files": {"part/weights": entry, "state": entry}}
    assert damage(path) is None
    assert damage(path, content=True) is None


def test_what_write_knows_of_checksums_is_not_reckoned_again(tmp_path, monkeypatch):
    def write(staging):
        writer("weights")(staging)
        return {"part/weights": checksum(staging / "part" / "weights")}

    read = []
    monkeypatch.setattr("xtuner_hydra.checkpoint.commit.checksum", lambda path: read.append(path.name) or checksum(path))
    path = commit(tmp_path / "step-1", write)
    assert read == ["state"]
    assert damage(path, content=True) is None


def test_committed_ones_come_in_the_order_of_their_numbers(tmp_path):
    for step in (100, 9, 20):
        save(tmp_path, step, keep=9)
    assert steps(tmp_path) == [9, 20, 100]


def test_where_nothing_was_saved_nothing_is_committed(tmp_path):
    assert committed(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("error", "raised"), [(Crash(), Crash), (OSError(28, "No space left on device"), SaveError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_crash_while_writing_commits_nothing_and_leaves_the_old_ones(tmp_path, error, raised):
    for step in (1, 2):
        save(tmp_path, step)

    def write(staging):
        (staging / "state").write_text("half")
        raise error

    with pytest.raises(raised):
        commit(tmp_path / "step-3", write)
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


@pytest.mark.parametrize("content", ["content of 3", "saved again"])
def test_a_crash_at_any_call_while_a_step_is_saved_again_keeps_it_as_it_was_or_is(tmp_path, monkeypatch, content):
    """The only checkpoint, saved again by a run that was resumed from it: its name may be missing until the next resume gives it back."""
    crashes = 0
    while True:
        parent = tmp_path / str(crashes)
        save(parent, 3, keep=1)
        with monkeypatch.context() as patched:
            left = iter(range(crashes, -1, -1))
            for module, name in [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")]:
                patched.setattr(module, name, dying(getattr(module, name), left))
            try:
                save(parent, 3, keep=1, content=content)
            except Crash:
                pass
            else:
                break
        assert has_saved(parent)
        put_back(parent)
        assert steps(parent) == [3]
        assert damage(parent / "step-3", content=True) is None
        assert (parent / "step-3" / "state").read_text() in ("content of 3", content)
        crashes += 1
        save(parent, 3, keep=1)
        assert os.listdir(parent) == ["step-3"]
    assert crashes > 8, "the places of the crashes have gone: look at the calls"


def test_a_step_that_cannot_take_its_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    save(tmp_path, 3)
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(SaveError, match="Input/output error"):
        save(tmp_path, 3, content="saved again")
    assert (tmp_path / "step-3" / "state").read_text() == "content of 3"


def dying(function, left):
    def call(*args, **kwargs):
        if next(left, 0) == 0:
            raise Crash
        return function(*args, **kwargs)

    return call


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
        (lambda path: (path / "manifest.json").write_text('{"name": "step-2", "files": {"state": 12}}'), "manifest.json"),
        (lambda path: shutil.copy(path.parent / "step-1" / "manifest.json", path), "manifest.json belongs to step-1"),
        (lambda path: in_manifest(path, "/etc/hostname"), "/etc/hostname, which is outside the directory"),
        (lambda path: in_manifest(path, "../step-1/state"), "../step-1/state, which is outside the directory"),
        (lambda path: in_manifest(path, "part/../../step-1/state"), "which is outside the directory"),
    ],
)
def test_a_damaged_directory_is_not_committed(tmp_path, harm, words):
    save(tmp_path, 1)
    harm(save(tmp_path, 2))
    assert steps(tmp_path) == [1]
    assert words in damage(tmp_path / "step-2")


def in_manifest(path, name):
    """Add a file of another place to the manifest, with its true size and checksum."""
    manifest = json.loads((path / "manifest.json").read_text())
    other = path / name
    manifest["files"][name] = {"size": other.stat().st_size, "crc32": checksum(other)}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("file", ["state", "part/weights"])
def test_a_flipped_bit_is_found_where_the_content_is_read(tmp_path, file):
    path = save(tmp_path, 1)
    content = bytearray((path / file).read_bytes())
    content[3] ^= 1
    (path / file).write_bytes(content)
    assert damage(path) is None
    assert damage(path, content=True) == f"{file} differs from what was saved"


def test_a_file_that_the_disk_does_not_give_back_is_damage(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    path = save(tmp_path, 1)
    monkeypatch.setattr("xtuner_hydra.checkpoint.commit.checksum", fail)
    assert damage(path, content=True) == "part/weights cannot be read: Input/output error"


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
        commit(tmp_path / "step-1", write)
    assert os.listdir(tmp_path) == [".step-1.tmp"]
    save(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-1"]
    assert not (tmp_path / "step-1" / "leftover").exists()


def commit_on_a_rank(parent):
    """All ranks write; then the second one fails, which must not leave the others waiting for ever."""
    dist.init_process_group("gloo")

    def write(staging):
        (staging / f"rank{dist.get_rank()}").write_text("x")
        return {f"rank{dist.get_rank()}": checksum(staging / f"rank{dist.get_rank()}")}

    def fail(staging):
        write(staging)
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device", "rank1")

    commit(parent / "step-1", write)
    errors = []
    for action in (fail, write):
        try:
            commit(parent / "step-2", action)
        except SaveError as error:
            errors.append(str(error))
    return errors


def test_ranks_commit_together_or_not_at_all(tmp_path):
    """Each is told which rank failed and why; the next save goes through."""
    first, second = run_on_ranks(commit_on_a_rank, 2, tmp_path)
    assert first == second
    (message,) = first
    assert f"{tmp_path / 'step-2'} could not be saved (rank 1): No space left on device: rank1." in message
    assert steps(tmp_path) == [1, 2]
    assert set(json.loads((tmp_path / "step-2" / "manifest.json").read_text())["files"]) == {"rank0", "rank1"}
    assert damage(tmp_path / "step-2", content=True) is None


def begin_on_a_rank(parent):
    """The first rank cannot even make the staging directory."""
    dist.init_process_group("gloo")
    try:
        commit(parent / "step-1", lambda staging: pytest.fail("was called"))
    except SaveError as error:
        return str(error)


def test_a_first_rank_that_cannot_begin_fails_all(tmp_path):
    (tmp_path / "file").write_text("")
    told = run_on_ranks(begin_on_a_rank, 2, tmp_path / "file")
    assert told[0] == told[1]
    assert "(rank 0): Not a directory" in told[0]
