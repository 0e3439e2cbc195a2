"""Weights on 2 gloo ranks: initial and pretrained ones are bit for bit those of one process, however they are sharded."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.fsdp import fully_shard

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.pretrained import load_pretrained
from xtuner_hydra.model.transformer import CausalLM

CONFIG = ModelConfig(
    vocab_size=71,  # odd: the ranks' parts differ in size
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=10,
    attention_bias=True,
)


def sharded(mesh):
    with torch.device("meta"):
        model = CausalLM(CONFIG)
    for module in [*model.model.layers, model.model.embed_tokens, model.lm_head, model]:
        fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    return model


def compare_on_a_rank(mesh_shape, weights):
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    expected = torch.load(weights / "expected.pt")
    for fill in (lambda model: initialise(model, 5), lambda model: load_pretrained(model, weights)):
        model = sharded(mesh)
        fill(model)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), expected[name]), name
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh_shape", [(1, 2), (2, 1)], ids=["sharded", "replicated"])
def test_two_ranks_get_the_weights_of_one(mesh_shape, tmp_path):
    from safetensors.torch import save_file

    model = CausalLM(CONFIG)
    initialise(model, 5)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(expected, tmp_path / "expected.pt")
    save_file(expected, tmp_path / "model.safetensors")
    run_on_ranks(compare_on_a_rank, 2, mesh_shape, tmp_path)
