"""FLOPs counted from shapes against torch's own counter of the operations that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xtuner_hydra.config.schema import Config, DataConfig, LoRAConfig, ModelConfig, MoEConfig
from xtuner_hydra.model.adapters import set_trainable
from xtuner_hydra.model.flops import training_flops
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.transformer import CausalLM

SHAPE = ModelConfig("qwen3", 97, 40, 72, 3, 6, 2, 10)
CASES = {
    "dense": {},
    "experts": {"moe": MoEConfig(6, 2, 20)},
    "experts in some layers": {"moe": MoEConfig(6, 2, 20, decoder_sparse_step=2)},
}


@pytest.mark.parametrize("supervised", [21, 5])
@pytest.mark.parametrize("case", CASES)
def test_products_with_weights_are_those_that_run(case, supervised):
    """One token a document: attention has one pair each, which torch counts too (as a product of a row with itself)."""
    config = ModelConfig(**vars(SHAPE) | CASES[case])
    model = CausalLM(config)
    initialise(model, 0)
    tokens = 24
    ids, cu_seqlens, rows = torch.arange(tokens), torch.arange(tokens + 1, dtype=torch.int32), torch.arange(3, supervised + 3)
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.zeros(tokens, dtype=torch.long), cu_seqlens, 1, rows=rows)
    weights_only = training_flops(config, [1] * tokens, supervised) / 3 - 4 * config.num_hidden_layers * 60 * tokens
    counts = counter.get_flop_counts()["Global"]
    ran = sum(count for operation, count in counts.items() if "attention" not in str(operation) and "bmm" not in str(operation))
    assert ran == weights_only


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "layers.1.mlp.down_proj"]])
def test_products_under_adapters_are_those_that_run(targets):
    """Forward and backward. No gradient goes below the first adapter: that of the first layer's input is counted and is not computed."""
    config = ModelConfig(**vars(SHAPE) | {"adapter": "lora", "lora": LoRAConfig(rank=3, targets=targets)})
    model = CausalLM(config)
    set_trainable(model, Config(model=config, data=DataConfig(path="unused")))
    initialise(model, 0)
    tokens = 24
    ids, cu_seqlens = torch.arange(tokens), torch.arange(tokens + 1, dtype=torch.int32)
    rows = torch.arange(5, 16)
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.zeros(tokens, dtype=torch.long), cu_seqlens, 1, rows=rows).sum().backward()
    weights_only = training_flops(config, [1] * tokens, len(rows)) - 3 * 4 * config.num_hidden_layers * 60 * tokens
    ran = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation) and "bmm" not in str(operation)
    )
    spared = 2 * tokens * 40 * (60 + 20 + 20)  # q, k and v of the first layer
    adapters = {"all-linear": 3, "k_proj": 1}[targets if isinstance(targets, str) else targets[0]]
    assert ran == weights_only - spared - 2 * tokens * 3 * 40 * adapters


@pytest.mark.parametrize("window", [None, 1, 5, 7, 100])
def test_pairs_in_attention_are_those_of_the_mask(window):
    lengths = [7, 1, 12]
    config = ModelConfig(**vars(SHAPE) | {"sliding_window": window})
    distances = [torch.arange(length)[:, None] - torch.arange(length) for length in lengths]
    pairs = sum(int(((distance >= 0) & (distance < (window or 1000))).sum()) for distance in distances)
    without = training_flops(config, [0] * 0, 0)
    weights = training_flops(ModelConfig(**vars(SHAPE)), [1], 0) - 3 * 4 * 3 * 60
    assert training_flops(config, lengths, 0) - without - 20 * weights == 3 * 4 * 3 * 60 * pairs
