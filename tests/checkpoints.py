"""Checkpoints as a saver leaves them, made without a model."""

import json
from dataclasses import asdict

from xtuner_hydra.checkpoint.commit import MANIFEST
from xtuner_hydra.checkpoint.state import TrainState
from xtuner_hydra.files import checksum, write_json


def make_checkpoint(parent, step, *, trajectory=None, **evaluation):
    """parent/step-N, whole, with a few bytes of weights. `evaluation`: `eval_loss=...` for eval/loss."""
    path = parent / f"step-{step}"
    path.mkdir(parents=True)
    (path / "rank-0.safetensors").write_bytes(step.to_bytes(4, "little") * 100)
    state = TrainState(step=step, evaluation={name.replace("_", "/"): value for name, value in evaluation.items()})
    write_json(path / "state.json", {"state": asdict(state), "trajectory": trajectory or {}})
    files = sorted(file for file in path.iterdir())
    write_json(path / MANIFEST, {"name": path.name, "files": {f.name: {"size": f.stat().st_size, "crc32": checksum(f)} for f in files}})
    return path


def make_export(parent, step):
    """parent/step-N, whole, as far as its manifest goes."""
    path = parent / f"step-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    entry = {"size": 7, "crc32": checksum(path / "model.safetensors")}
    (path / MANIFEST).write_text(json.dumps({"name": path.name, "files": {"model.safetensors": entry}}))
    return path


def flip_bit(path, at=10):
    """Change a file's content, but not its size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
