"""The decoder against transformers' Qwen3ForCausalLM and LlamaForCausalLM, and packed documents against separate ones."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.model.families import hf_config
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.transformer import CausalLM

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "rope_theta": 5e4,
}
CASES = {
    "head_dim unlike hidden/heads": {},
    "one key-value head": {"num_key_value_heads": 1},
    "as many key-value heads": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "large epsilon": {"rms_norm_eps": 0.1},
    "Llama": {"family": "llama", "qk_norm": False, "hidden_size": 42},  # transformers wants hidden divisible by heads here
}


def build(**changes):
    """(ours, Hugging Face's) with the same weights, large enough that every part matters."""
    config = ModelConfig(**SHAPE | changes)
    values = hf_config(config, "float32", bos_token_id=None, eos_token_id=None)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    ours = CausalLM(config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def pack(documents):
    """Arguments of CausalLM for documents in one pack."""
    lengths = [len(document) for document in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(documents), positions, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


def document(length, seed, vocab=SHAPE["vocab_size"]):
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_every_gradient_are_those_of_transformers(changes):
    ours, theirs = build(**changes)
    ids, labels = document(61, 1), document(61, 2)
    rows = torch.arange(0, 61, 3)

    logits, expected = ours(*pack([ids])), theirs(ids[None]).logits[0]
    assert expected.std() > 0.5, "logits too small to show a fault"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    loss = ours(*pack([ids]), rows=rows, targets=labels[rows])
    expected_loss = F.cross_entropy(expected[rows], labels[rows], reduction="sum")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    loss.backward()
    expected_loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).norm() < 1e-3 * gradients[name].norm(), name


def test_packed_documents_are_as_if_alone():
    ours, theirs = build()
    documents = [document(length, length) for length in (17, 1, 40, 2, 23)]
    packed = ours(*pack(documents))
    separate = torch.cat([theirs(ids[None]).logits[0] for ids in documents])
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-4)

    ours.zero_grad()
    rows, targets = torch.arange(len(packed)), document(len(packed), 9)
    ours(*pack(documents), rows=rows, targets=targets).backward()
    F.cross_entropy(separate, targets, reduction="sum").backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() < 1e-3 * other.grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_do_not_see_each_other(dtype):
    model, _ = build()
    model.to(dtype)
    first, other, second, third = document(33, 1), document(33, 2), document(20, 3), document(9, 4)
    before, after = model(*pack([first, second, third])), model(*pack([other, second, third]))
    assert not torch.equal(before[:33], after[:33])
    assert torch.equal(before[33:], after[33:])  # not one bit may leak
    last_changed = model(*pack([first, second, document(9, 5)]))
    assert torch.equal(before[:53], last_changed[:53])


def test_a_token_does_not_see_what_follows():
    model, _ = build()
    ids = document(30, 1)
    changed = torch.cat([ids[:20], document(10, 2)])
    assert torch.equal(model(*pack([ids]))[:20], model(*pack([changed]))[:20])


@pytest.mark.parametrize("tied", [False, True])
def test_without_a_supervised_token_every_gradient_is_there_and_zero(tied):
    model, _ = build(tie_word_embeddings=tied)
    none = torch.empty(0, dtype=torch.long)
    loss = model(*pack([document(5, 1)]), rows=none, targets=none)
    loss.backward()
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_from_the_meta_device_is_the_same_model(tied):
    config = ModelConfig(**SHAPE, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = CausalLM(config)
    model.to_empty(device="cpu")
    initialise(model, 3)
    direct = CausalLM(config)
    initialise(direct, 3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not list(model.buffers())
    assert torch.equal(model(*pack([document(12, 1)])), direct(*pack([document(12, 1)])))


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_loss_and_gradients_are_near_those_of_fp32(tied):
    """Computed in bf16, the gradient points where fp32's does; a rounding in the wrong place shows as a far larger angle."""
    ours, _ = build(tie_word_embeddings=tied)
    low, _ = build(tie_word_embeddings=tied)
    low.to(torch.bfloat16)
    documents, targets = [document(40, 1), document(60, 2)], document(100, 3)
    losses = [model(*pack(documents), rows=torch.arange(100), targets=targets) for model in (ours, low)]
    for loss in losses:
        loss.backward()
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    high_grad, low_grad = (torch.cat([p.grad.float().flatten() for p in model.parameters()]) for model in (ours, low))
    assert F.cosine_similarity(high_grad, low_grad, dim=0) > 0.99


def test_the_embedding_gradient_of_a_frequent_token_is_summed_in_fp32():
    model, _ = build()
    table = model.model.embed_tokens.to(torch.bfloat16)
    ids = torch.tensor([5] * 2000 + [7, 3, 7])
    table(ids).sum().backward()
    assert torch.equal(table.weight.grad[[5, 7, 3, 4]], torch.tensor([2000.0, 2.0, 1.0, 0.0]).bfloat16()[:, None].expand(4, 40))


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_under_fsdp_loss_and_gradients_stay_the_same(tied, one_rank):
    model, _ = build(tie_word_embeddings=tied)
    plain, _ = build(tie_word_embeddings=tied)
    for module in [*model.model.layers, *([] if tied else [model.model.embed_tokens, model.lm_head]), model]:
        fully_shard(module, mesh=one_rank)
    arguments = pack([document(9, 1), document(30, 2)])
    for a_model in (model, plain):
        a_model(*arguments, rows=torch.arange(5, 25), targets=document(20, 3)).backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad.full_tensor(), other.grad), name
