"""Adapters and frozen parameters under FSDP: one rank or two, packed, recomputed, tied; the base stays what it was, to the last bit."""

import re
from types import SimpleNamespace

import pytest
import torch
from parity import document, make_checkpoint, ours, packed_batch, tensors
from ranks import run_on_ranks

from xtuner_hydra.build import build_engine
from xtuner_hydra.config.schema import Config, DataConfig, LoRAConfig, ModelConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.model.adapters import is_adapter, merged, whole
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.parallel.runtime import runtime

DOCUMENTS = [document(length, length) for length in (13, 40, 7, 22)]
SUPERVISED = sum(len(ids) - 1 for ids in DOCUMENTS)
SPREADS = {  # for each rank its micro-batches, each a list of documents
    "1 rank, packed": [[[0, 1, 2, 3]]],
    "1 rank, one by one": [[[0], [1], [2], [3]]],
    "2 ranks": [[[0, 1]], [[2, 3]]],
    "2 ranks, one without a pack": [[[0, 1, 2, 3]], [[]]],
}
KINDS = {
    "lora": {"adapter": "lora"},
    "lora and dropout": {"adapter": "lora", "lora": LoRAConfig(rank=4, dropout=0.5)},
    "lora beside experts": {"adapter": "lora", "lora": LoRAConfig(rank=4, targets=["q_proj", "v_proj"])},
    "frozen in part": {"freeze": ["*embed_tokens*", "*.layers.1.*", "*q_proj*"]},
}


JOBS = {  # name -> kind, spread, dtype, share recomputed
    **{f"{kind}: {spread}": (kind, spread, "float32", 0.0) for kind in ("lora", "frozen in part") for spread in SPREADS},
    "lora: 2 ranks, recomputed": ("lora", "2 ranks", "float32", 1.0),
    "frozen in part: 2 ranks, recomputed": ("frozen in part", "2 ranks", "float32", 1.0),
    "lora, bfloat16": ("lora", "2 ranks", "bfloat16", 0.0),
    "frozen in part, bfloat16": ("frozen in part", "2 ranks", "bfloat16", 0.0),
    **{f"dropout {number}": ("lora and dropout", "1 rank, packed", "float32", ratio) for number, ratio in enumerate((0.0, 0.0, 1.0))},
}
EXPERTS = {  # the same of a model with experts, of which only the attention has adapters
    **{spread: ("lora beside experts", spread, "float32", 0.0) for spread in SPREADS},
    "2 ranks, recomputed": ("lora beside experts", "2 ranks", "float32", 1.0),
    "2 ranks, bfloat16": ("lora beside experts", "2 ranks", "bfloat16", 0.0),
}


def train_on_a_rank(checkpoint, jobs):
    with runtime(config_of(checkpoint, "lora beside experts", "float32", 0.0)) as place:
        drawn = torch.rand(3).tolist()
        return {"drawn": drawn} | {name: train(checkpoint, place, *job) for name, job in jobs.items()}


def config_of(checkpoint, kind, dtype, ratio):
    changes = {"lora": LoRAConfig(rank=4)} | KINDS[kind]
    freeze = changes.pop("freeze", [])
    return Config(
        model=ModelConfig(**read_hf_config(checkpoint), pretrained=str(checkpoint), **changes),
        data=DataConfig(path="unused"),
        parallelism=ParallelismConfig(param_dtype=dtype, recompute_ratio=ratio),
        trainer=TrainerConfig(device="cpu", freeze=freeze),
    )


def train(checkpoint, place, kind, spread, dtype, ratio):
    """Three steps; the losses, and what became of the parameters."""
    torch.manual_seed(place.rank)
    engine = build_engine(config_of(checkpoint, kind, dtype, ratio), place)
    batches = [packed_batch([DOCUMENTS[number] for number in numbers]) for numbers in SPREADS[spread][place.rank]]
    steps = [engine.train_step(batches, SUPERVISED, lr=0.01) for _ in range(3)]
    parameters = dict(engine.model.named_parameters())
    return SimpleNamespace(
        evaluated=[engine.evaluate(batches)[0] for _ in range(2)],
        losses=[float(step.loss) for step in steps],
        norms=[step.grad_norm for step in steps],
        trained={name: whole(value) for name, value in parameters.items() if value.requires_grad},
        frozen={name: whole(value) for name, value in parameters.items() if not value.requires_grad},
        moments=len(engine.optimizers[0].state),
        without_gradient=all(value.grad is None for value in parameters.values() if not value.requires_grad),
        merged=dict(merged(engine.model)),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base"), "smollm2", torch.bfloat16)  # tied


@pytest.fixture(scope="module")
def ranks(checkpoint):
    """Of each number of ranks, what each rank says of every job."""
    return on_ranks(checkpoint, JOBS)


def on_ranks(checkpoint, jobs):
    by_ranks = {number: {name: job for name, job in jobs.items() if len(SPREADS[job[1]]) == number} for number in (1, 2)}
    return {number: run_on_ranks(train_on_a_rank, number, checkpoint, some) for number, some in by_ranks.items()}


@pytest.mark.parametrize("kind", ["lora", "frozen in part"])
def test_every_spread_trains_the_same(ranks, kind):
    one = ranks[1][0][f"{kind}: 1 rank, packed"]
    assert one.losses[2] < one.losses[0]
    others = [(name, result) for number in (1, 2) for rank in ranks[number] for name, result in rank.items() if name.startswith(f"{kind}:")]
    assert len(others) == 2 + 2 * 3
    for spread, other in others:
        assert other.losses == pytest.approx(one.losses, rel=1e-5), spread
        assert other.norms == pytest.approx(one.norms, rel=1e-4), spread
        for name, value in one.trained.items():
            # Adam divides by the gradient's size: where that is next to nothing, rounding decides
            assert (other.trained[name] - value).abs().mean() < 1e-4, (spread, name)


@pytest.mark.parametrize("job", ["lora: 2 ranks", "lora, bfloat16", "frozen in part, bfloat16"])
def test_frozen_parameters_keep_the_bits_and_the_dtype_of_their_files(ranks, checkpoint, job):
    stored = tensors(checkpoint)
    for rank in ranks[2]:
        result = rank[job]
        assert result.frozen
        for name, value in result.frozen.items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, stored[name]), name
        assert all(value.dtype == torch.float32 for value in result.trained.values())  # master weights
        assert result.without_gradient
        assert result.moments == len(result.trained)


def test_an_adapter_is_all_that_is_trained_and_merging_is_all_it_changes(ranks, checkpoint):
    result = ranks[2][0]["lora, bfloat16"]
    assert all(map(is_adapter, result.trained))
    stored = tensors(checkpoint)
    changed = {name for name, value in result.merged.items() if not torch.equal(value.float(), stored[name].float())}
    assert changed == {name.replace(".lora_B.", ".") for name in result.trained if ".lora_B." in name}


def test_dropout_repeats_itself_and_recomputation_draws_what_the_forward_pass_drew(ranks):
    first, again, recomputed = (ranks[1][0][f"dropout {number}"] for number in range(3))
    assert first.losses == again.losses
    assert first.norms == again.norms
    assert recomputed.losses == pytest.approx(first.losses, rel=1e-6)
    assert recomputed.norms == pytest.approx(first.norms, rel=1e-5)
    assert first.evaluated[0] == first.evaluated[1]  # nothing is left out
    without = ranks[1][0]["lora: 1 rank, packed"]
    assert first.losses[0] == pytest.approx(without.losses[0])  # B is zero
    assert abs(first.losses[2] - without.losses[2]) > 1e-3


def test_ranks_leave_out_other_inputs(ranks):
    first, second = ranks[2]
    assert first["drawn"] != second["drawn"]


def test_adapters_beside_experts_train_the_same_on_any_number_of_ranks(tmp_path):
    """With a load-balancing loss whose gradient counts; router and experts keep the bits of their files, one part a rank."""
    checkpoint = make_checkpoint(tmp_path, "qwen3_moe", torch.bfloat16, router_aux_loss_coef=0.5)
    ranks = on_ranks(checkpoint, EXPERTS)
    one = ranks[1][0]["1 rank, packed"]
    assert one.losses[2] < one.losses[0]
    stored = dict(ours(checkpoint).named_parameters())
    results = [(name, rank[name]) for number in (1, 2) for rank in ranks[number] for name in EXPERTS if name in rank]
    assert len(results) == 2 + 2 * 4
    for name, result in results:
        assert all(re.search(r"self_attn\.[qv]_proj\.lora_[AB]\.weight$", trained) for trained in result.trained)
        assert len(result.trained) == 3 * 2 * 2
        for frozen, value in result.frozen.items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value.float(), stored[frozen]), (name, frozen)
        if name == "2 ranks, bfloat16":
            assert result.losses == pytest.approx(one.losses, rel=0.05)
        elif "one by one" not in name:  # micro-batches balance their load each by itself
            assert result.losses == pytest.approx(one.losses, rel=1e-5), name
            assert result.norms == pytest.approx(one.norms, rel=1e-4), name
