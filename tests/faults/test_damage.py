"""A checkpoint that has been damaged is passed over with a warning, and the one before it is used; the run goes its way exactly."""

import shutil

import pytest
from exactness import assert_same, copy_until
from forks import prepare, train_on

JOB = ("debug=fast", "tracking=none", "data.eval_path=null", "checkpoint.hf_interval=null", "checkpoint.interval=1", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps on two ranks, with a checkpoint after each."""
    run = prepare(tmp_path_factory.mktemp("damage"), *JOB, "trainer.total_steps=4", "trainer.global_batch_size=2")
    codes, text = train_on(run, 2)
    assert codes == [0, 0], text
    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another run's checkpoints of the same steps and sizes."""
    run = prepare(tmp_path_factory.mktemp("other"), *JOB, "trainer.total_steps=3", "trainer.global_batch_size=2", "trainer.seed=7")
    codes, text = train_on(run, 2)
    assert codes == [0, 0], text
    return run


def truncate(checkpoint, other):
    shard = checkpoint / "rank-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])


def flip(checkpoint, other):
    shard = checkpoint / "rank-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def forget(checkpoint, other):
    (checkpoint / "rng-1.json").unlink()


def swap_manifest(checkpoint, other):
    shutil.copy(other / "checkpoints" / "step-3" / "manifest.json", checkpoint)


def swap_step(checkpoint, other):
    shutil.copy(checkpoint.with_name("step-2") / "manifest.json", checkpoint)


def cut_manifest(checkpoint, other):
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text()[:50])


def half_write(checkpoint, other):
    checkpoint.rename(checkpoint.with_name(".step-3.tmp"))


@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (truncate, "rank-1.safetensors has "),
        (flip, "rank-0.safetensors differs from what was saved"),
        (forget, "rng-1.json is missing"),
        (swap_manifest, "rank-0.safetensors differs from what was saved"),
        (swap_step, "manifest.json belongs to step-2"),
        (cut_manifest, "manifest.json is missing or cannot be read"),
        (half_write, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_checkpoint_is_passed_over(whole, other, tmp_path, hurt, words):
    run = copy_until(whole, tmp_path / "run", 3)
    hurt(run / "checkpoints" / "step-3", other)
    codes, text = train_on(run, 2)
    assert codes == [0, 0], text
    if words:
        assert f"step-3 is skipped: {words}" in text
    assert f"resumed from {run}/checkpoints/step-2" in text
    assert_same(run, whole, 4)
    assert not list((run / "checkpoints").glob(".*"))


def test_without_a_whole_one_nothing_is_overwritten(whole, tmp_path):
    run = copy_until(whole, tmp_path / "run", 1)
    flip(run / "checkpoints" / "step-1", None)
    codes, text = train_on(run, 2)
    assert codes[0] == 2, text  # the other rank, which waits for it, cannot know why it ends
    assert "all its checkpoints are damaged" in text
    assert "Traceback" not in text
    assert (run / "checkpoints" / "step-1").is_dir()
