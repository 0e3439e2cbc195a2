"""What a run will cost, against what it then has."""

import torch
from parity import make_checkpoint

from xtuner_hydra.config.schema import Config, DataConfig, LoRAConfig, ModelConfig
from xtuner_hydra.cost import count_parameters
from xtuner_hydra.model.families import read_hf_config


def test_frozen_weights_are_counted_as_they_are_stored(tmp_path):
    """A bfloat16 base takes two bytes per weight; what is trained has a gradient and two moments, all in fp32."""
    directory = make_checkpoint(tmp_path, "llama 3", dtype=torch.bfloat16)
    model = ModelConfig(**read_hf_config(directory) | {"pretrained": str(directory), "adapter": "lora", "lora": LoRAConfig(rank=2)})
    sizes = count_parameters(Config(model=model, data=DataConfig(path="x.jsonl")))
    assert 0 < sizes.trainable < sizes.total
    assert sizes.state_bytes == 2 * (sizes.total - sizes.trainable) + 16 * sizes.trainable
