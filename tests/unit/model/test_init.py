"""Initial weights: what distribution, and what they depend on."""

import torch
from torch.distributed.fsdp import fully_shard

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.transformer import CausalLM


def build(seed=1, **changes):
    shape = {"vocab_size": 1100, "hidden_size": 1024, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 16}
    model = CausalLM(ModelConfig(**shape | changes))
    initialise(model, seed)
    return dict(model.named_parameters())


def test_matrices_are_normal_with_deviation_002_norms_one_biases_zero():
    parameters = build(attention_bias=True)
    embedding = parameters["model.embed_tokens.weight"].double().flatten()
    assert len(embedding) > 2**20  # more than one block
    scaled = embedding / 0.02
    assert abs(scaled.mean()) < 0.005
    assert abs(scaled.std() - 1) < 0.005
    assert abs((scaled**4).mean() - 3) < 0.05
    assert abs((scaled.abs() < 1).double().mean() - 0.6827) < 0.005
    for name, parameter in parameters.items():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert abs(parameter.std() / 0.02 - 1) < 0.03, name


def test_no_two_parameters_or_blocks_are_alike():
    parameters = build()
    first, second = (parameters[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.02
    embedding = parameters["model.embed_tokens.weight"].flatten()
    assert not torch.equal(embedding[:1000], embedding[2**20 : 2**20 + 1000])


def test_weights_depend_on_seed_and_name_only():
    one, again, other = build(seed=1), build(seed=1), build(seed=2)
    deeper = build(seed=1, num_hidden_layers=3)  # parameters before and after it stay what they were
    for name in one:
        assert torch.equal(one[name], again[name]), name
        assert torch.equal(one[name], deeper[name]), name
        assert torch.equal(one[name], other[name]) == ("norm" in name), name


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = build()["lm_head.weight"]
        torch.set_num_threads(4)
        assert torch.equal(alone, build()["lm_head.weight"])
    finally:
        torch.set_num_threads(before)


def test_dtensors_of_one_rank_get_the_same_bits_as_plain_tensors():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        config = ModelConfig("qwen3", 71, 24, 36, 2, 4, 1, 10)
        plain, sharded = CausalLM(config), CausalLM(config)
        fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        initialise(plain, 7)
        initialise(sharded, 7)
        for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs), name
    finally:
        torch.distributed.destroy_process_group()


def test_other_dtypes_get_the_rounded_values():
    config = ModelConfig("qwen3", 71, 24, 36, 1, 4, 1, 10)
    high, low = CausalLM(config), CausalLM(config).to(torch.bfloat16)
    initialise(high, 7)
    initialise(low, 7)
    assert torch.equal(low.lm_head.weight, high.lm_head.weight.bfloat16())
