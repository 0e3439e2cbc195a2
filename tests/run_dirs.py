"""Run directories as a run leaves them, written by the project's own writers, for tests of what reads them."""

import json

from xtuner_hydra import run_dir
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig
from xtuner_hydra.files import write_json

SHAPE = dict(
    vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8
)
ENVIRONMENT = {
    "versions": {"torch": "2.13.0", "xtuner_hydra": "0.1.0"},
    "hardware": {"cpu": "a CPU", "gpus": []},
    "git": {"commit": "c" * 40, "dirty": False, "diff": ""},
    "threads": 1,
    "ranks": 1,
}


def make_config(lr=6e-5, path="/data/train.jsonl"):
    config = Config(model=ModelConfig(**SHAPE), data=DataConfig(path=path))
    config.optimizer.lr = lr
    return config


def make_run(directory, *, state="completed", lr=6e-5, losses=(3.0, 2.0), overrides=None, environment=None, files=(("/data/a", "hash"),)):
    """A run that has logged `losses`; its process is this one. `files`: (name, hash) of the training data."""
    overrides = [f"optimizer.lr={lr:g}"] if overrides is None else overrides
    run_dir.create(directory, make_config(lr), overrides, {**ENVIRONMENT, **(environment or {})})
    rows = [{"train/step": step, "train/loss": loss, "throughput/e2e_tgs": 100.0} for step, loss in enumerate(losses, start=1)]
    rows.append({"train/step": len(losses), "eval/loss": lr * 1e4})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = {name: value for row in rows for name, value in row.items() if value is not None}
    told = {} if state == "running" else {"metrics": last}
    run_dir.write_status(directory, state, step=len(losses), total_steps=len(losses), **told)
    write_json(directory / "data.json", {"tokenizer": "byte", "train": describe(files), "eval": None})
    return directory


def describe(files):
    return {
        "fingerprint": "-".join(digest for _, digest in files),
        "files": [name for name, _ in files],
        "hashes": [digest for _, digest in files],
        "samples": 10,
        "tokens": 100,
        "selected": {"samples": 10, "tokens": 100},
    }
