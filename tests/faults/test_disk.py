"""No space left, files that may not grow, directories that cannot be written: one sentence, and what was committed stands."""

import os
import subprocess
from contextlib import contextmanager

import pytest
from conftest import read_rows, read_status
from exactness import assert_same, set_config
from forks import prepare, train_on

from xtuner_hydra.checkpoint.commit import damage, numbered, step_of

STEPS = 5
JOB = ("debug=fast", "tracking=none", "data.eval_path=null", f"trainer.total_steps={STEPS}")
SAVES = ("checkpoint.interval=1", "checkpoint.keep=9", "checkpoint.hf_interval=null")
NOISE = ("Traceback", "--- Logging error ---", "Exception ignored", "None:")


@contextmanager
def mounted(directory, options):
    """A file system of its own at `directory`; skips where this is not allowed."""
    directory.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on a disk with room."""
    run = prepare(tmp_path_factory.mktemp("whole"), *JOB, *SAVES)
    codes, text = train_on(run)
    assert codes == [0], text
    return run


def size(directory):
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def assert_failed_in_words(run, codes, text, *words):
    assert set(codes) == {1}, text
    for word in words:
        assert word in text
    for noise in NOISE:
        assert noise not in text, text
    for path in [*numbered(run / "checkpoints"), *numbered(run / "hf")]:
        assert damage(path, content=True) is None


def assert_goes_on_exactly(run, whole, ranks=1):
    set_config(run, "checkpoint.resume", "auto")
    codes, text = train_on(run, ranks)
    assert codes == [0] * ranks, text
    assert_same(run, whole, STEPS)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_no_space_for_a_checkpoint(whole, tmp_path, asynchronous):
    room = int(2.5 * size(whole / "checkpoints" / "step-1")) + 300_000
    with mounted(tmp_path / "run", f"size={room}") as disk:
        run = prepare(tmp_path, *JOB, *SAVES, f"checkpoint.asynchronous={asynchronous}")
        codes, text = train_on(run)
        assert_failed_in_words(run, codes, text, "training failed: ", "checkpoints/step-3 could not be saved: ", "No space left on device")
        assert text.count("could not be saved") == 1
        assert [step_of(path) for path in numbered(run / "checkpoints")] == [1, 2]
        assert read_status(run).get("state") == "failed"
        subprocess.run(["mount", "-o", f"remount,size={10 * room}", disk], check=True)
        assert_goes_on_exactly(run, whole)


def test_no_space_for_an_export(whole, tmp_path):
    room = int(1.5 * size(whole / "checkpoints" / "step-1") / 3) + 300_000
    with mounted(tmp_path / "run", f"size={room}"):
        run = prepare(tmp_path, *JOB, "checkpoint.interval=null", "checkpoint.hf_interval=1")
        codes, text = train_on(run)
        assert_failed_in_words(run, codes, text, "hf/step-2 could not be saved: ", "No space left on device")
        assert damage((run / "hf" / "latest").resolve(strict=True), content=True) is None


def test_no_space_for_metrics(tmp_path):
    with mounted(tmp_path / "run", "size=64M") as disk:
        run = prepare(tmp_path, *JOB, "trainer.total_steps=200", "checkpoint.interval=null", "checkpoint.hf_interval=null")
        free = os.statvfs(disk)
        with (disk / "rest").open("wb") as rest:
            rest.write(bytes(free.f_bavail * free.f_frsize - 40_000))
        codes, text = train_on(run)
        assert_failed_in_words(run, codes, text, "metrics.jsonl", "No space left on device")
        assert len(text.splitlines()) < 150, text


@pytest.mark.parametrize(("ranks", "asynchronous"), [(1, False), (1, True), (2, True)])
def test_a_file_may_not_grow_so_large(whole, tmp_path, ranks, asynchronous):
    """Needs no root."""
    run = prepare(tmp_path, *JOB, *SAVES, f"checkpoint.asynchronous={asynchronous}", f"trainer.global_batch_size={ranks}")
    limit = str(size(whole / "checkpoints" / "step-1") // 4)
    codes, text = train_on(run, ranks, FILE_LIMIT=limit)
    assert_failed_in_words(run, codes, text, "checkpoints/step-1 could not be saved", "File too large")
    assert numbered(run / "checkpoints") == []
    if ranks == 1:
        assert_goes_on_exactly(run, whole)


def test_a_read_only_directory(whole, tmp_path):
    run = prepare(tmp_path, *JOB, *SAVES)
    with mounted(run / "checkpoints", "ro"):
        codes, text = train_on(run)
        assert_failed_in_words(run, codes, text, "could not be saved: Read-only file system")
        assert len(read_rows(run)) == 1
    assert_goes_on_exactly(run, whole)
