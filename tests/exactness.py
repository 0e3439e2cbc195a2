"""When two runs are the same: metrics and weights, bit for bit."""

import shutil

from conftest import read_rows
from safetensors.torch import load_file

from xtuner_hydra.run_dir import read_config, write_config

EXACT = ("train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/supervised_tokens", "train/total_tokens", "train/epoch")


def trajectory(run_dir):
    """What must be equal in every step."""
    return [[row["train/step"], *(row[name] for name in EXACT)] for row in read_rows(run_dir) if "train/loss" in row]


def tensors(checkpoint):
    """All that a checkpoint holds: (file, name) -> bytes."""
    return {
        (path.name, name): tensor.numpy().tobytes()
        for path in checkpoint.glob("rank-*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same(run_dir, reference, step):
    """The run went the reference's way, to the same weights and optimizer state at `step`."""
    assert trajectory(run_dir) == trajectory(reference)
    ours, theirs = (tensors(directory / "checkpoints" / f"step-{step}") for directory in (run_dir, reference))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert ours


def copy_until(run_dir, copy, step):
    """What `run_dir` would be, had it been killed right after the checkpoint of `step` (0: before the first); it resumes when started."""
    shutil.copytree(run_dir, copy, symlinks=True)
    for parent in ("checkpoints", "hf"):
        for path in (copy / parent).glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
    if not (copy / "hf" / "latest").exists():
        shutil.rmtree(copy / "hf", ignore_errors=True)
    if step == 0:
        (copy / "metrics.jsonl").unlink()
    (copy / "status.json").unlink()
    set_config(copy, "checkpoint.resume", "auto")
    return copy


def set_config(run_dir, key, value):
    """Set a key of config.yaml."""
    config = read_config(run_dir)
    group, _, name = key.partition(".")
    setattr(getattr(config, group), name, value)
    write_config(run_dir, config)
