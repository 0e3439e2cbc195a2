"""A config with data of its own."""

import pytest
from chats import chat, write_lines

from xtuner_hydra.config.schema import Config, DataConfig, TrainerConfig


@pytest.fixture
def config(tmp_path):
    write_lines(tmp_path / "train.jsonl", [chat("x" * n) for n in range(1, 30)])
    write_lines(tmp_path / "held-out.jsonl", [chat("y" * n) for n in range(1, 5)])
    data = DataConfig(
        path=str(tmp_path / "train.jsonl"),
        eval_path=str(tmp_path / "held-out.jsonl"),
        pack_max_length=128,
        cache_dir=str(tmp_path / "cache"),
    )
    return Config(data=data, trainer=TrainerConfig(epochs=2, global_batch_size=2))
