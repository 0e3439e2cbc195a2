"""FLOPs counted from shapes against torch's own counter of the operations that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xtuner_hydra.config.schema import Config, DataConfig, LoRAConfig, ModelConfig, MoEConfig, TrainerConfig
from xtuner_hydra.model.adapters import set_trainable
from xtuner_hydra.model.flops import training_flops
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.transformer import CausalLM

SHAPE = ModelConfig("qwen3", 97, 40, 72, 3, 6, 2, 10)
MOE = {"moe": MoEConfig(6, 2, 20)}
TOKENS = 24
CASES = {
    "dense": {},
    "tied": {"tie_word_embeddings": True},
    "experts": MOE,
    "experts in some layers": {"moe": MoEConfig(6, 2, 20, decoder_sparse_step=2)},
    "every adapter": {"adapter": "lora", "lora": LoRAConfig(rank=3, targets="all-linear")},
    "two adapters": {"adapter": "lora", "lora": LoRAConfig(rank=3, targets=["k_proj", "layers.1.mlp.down_proj"])},
    "adapters beside experts": {"adapter": "lora", "lora": LoRAConfig(rank=3, targets=["q_proj", "o_proj"]), **MOE},
}
FREEZES = {
    "nothing": [],
    "the layers": ["model.layers.*"],
    "the embedding and a layer": ["model.embed_tokens.weight", "model.layers.0.*"],
    "all but the last MLP": [
        "model.embed*",
        "model.layers.[01].*",
        "model.layers.2.self_attn.*",
        "model.layers.2.*norm.weight",
        "model.norm*",
    ],
    "all but norms and routers": ["*embed*", "*_proj*", "lm_head*"],
}
OF_ADAPTERS = ("nothing", "the embedding and a layer")  # the others leave none to train
PAIRS = [(case, freeze) for case in CASES for freeze in FREEZES if "adapter" not in case or freeze in OF_ADAPTERS]


def model_of(changes, freeze):
    """(config, model, names of its trained parameters)"""
    config = ModelConfig(**vars(SHAPE) | changes)
    model = CausalLM(config)
    set_trainable(model, Config(model=config, data=DataConfig(path="unused"), trainer=TrainerConfig(freeze=freeze)))
    initialise(model, 0)
    return config, model, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def products_that_run(model, rows):
    """FLOPs of the products with weights in the forward and backward pass. One token a document: attention has one pair each."""
    ids, cu_seqlens = torch.arange(TOKENS), torch.arange(TOKENS + 1, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        logits, _ = model.model(ids, torch.zeros(TOKENS, dtype=torch.long), cu_seqlens, 1, rows=rows)
        torch.nn.functional.linear(logits, model.lm_head.weight).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "attention" not in str(operation) and "bmm" not in str(operation))


@pytest.mark.parametrize("supervised", [21, 5])
@pytest.mark.parametrize(("case", "freeze"), PAIRS)
def test_products_with_weights_are_those_that_run(case, freeze, supervised):
    config, model, trained = model_of(CASES[case], FREEZES[freeze])
    flops = training_flops(config, trained)
    without_pairs = flops.of([1] * TOKENS, supervised) - TOKENS * flops.per_pair
    assert products_that_run(model, torch.arange(3, supervised + 3)) == without_pairs


@pytest.mark.parametrize("window", [None, 1, 5, 7, 100])
def test_pairs_in_attention_are_those_of_the_mask(window):
    """Forward, and twice that backward: 4 a head dimension of each head and layer."""
    lengths = [7, 1, 12]
    config, _, trained = model_of({"sliding_window": window}, [])
    distances = [torch.arange(length)[:, None] - torch.arange(length) for length in lengths]
    pairs = sum(int(((distance >= 0) & (distance < (window or 1000))).sum()) for distance in distances)
    flops = training_flops(config, trained)
    assert flops.of(lengths, 0) - 20 * flops.per_token == 3 * 4 * 3 * 60 * pairs


def test_attention_has_no_backward_pass_where_nothing_before_it_is_trained():
    config, _, trained = model_of({}, FREEZES["all but the last MLP"])
    assert training_flops(config, trained).per_pair == 4 * 3 * 60
