"""LoRA against peft: what we export it loads, to the same logits and gradients; merged as it merges. And what is refused."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from parity import document, make_checkpoint, pack, tensors, theirs

from xtuner_hydra.checkpoint.export import export, export_adapter
from xtuner_hydra.config.schema import Config, DataConfig, LoRAConfig, ModelConfig, MoEConfig, TrainerConfig
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.adapters import blueprint, is_adapter, set_trainable
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.model.hub import published_name
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.pretrained import load_pretrained
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.runtime import runtime

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "llama 3.2": "all-linear",
    "qwen2 head_dim": "all-linear",
    "qwen3": ["q_proj", "mlp.down_proj"],
    "mistral": "v_proj",
    "qwen3_moe": ATTENTION,
    "qwen3_moe mixed": "self_attn.k_proj",
}
SHAPE = ModelConfig("qwen3", 97, 40, 72, 2, 6, 2, 10)


def config_of(directory, targets="all-linear", **lora):
    lora = LoRAConfig(**{"rank": 4, "alpha": 10.0, "targets": targets} | lora)
    model = ModelConfig(**read_hf_config(directory), pretrained=str(directory), adapter="lora", lora=lora)
    return Config(model=model, data=DataConfig(path="unused"), trainer=TrainerConfig(device="cpu"))


def adapted(config):
    """Our model with the base of `config` and an adapter so large that a fault shows."""
    model = CausalLM(config.model)
    set_trainable(model, config)
    load_pretrained(model, config.model.pretrained)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0.0, 0.2)
    return model


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(config, our model, the directory of its base)"""
    base = make_checkpoint(tmp_path / "base", request.param)
    config = config_of(base, CASES[request.param])
    return config, adapted(config), base


def publish(function, config, model, directory, **options):
    with runtime(config):
        return function(directory, 1, model, config.model, ByteTokenizer(), keep=1, **options)


def test_peft_loads_the_adapter_and_gives_our_logits_and_gradients(case, tmp_path):
    config, model, base = case
    directory = publish(export_adapter, config, model, tmp_path / "hf")
    reference = peft.PeftModel.from_pretrained(theirs(base), directory, is_trainable=True)
    documents = [document(40, 1), document(23, 2)]
    targets = document(63, 3)
    logits, expected = model(*pack(documents)), torch.cat([reference(ids[None]).logits[0] for ids in documents])
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for each in (logits, expected):
        F.cross_entropy(each, targets, reduction="sum").backward()
    ours, gradients = dict(model.named_parameters()), {}
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            gradients[name.removeprefix("base_model.model.").replace(".default", "")] = parameter.grad
    assert gradients.keys() == {name for name, parameter in ours.items() if parameter.requires_grad}
    for name, gradient in gradients.items():
        assert (ours[name].grad - gradient).norm() < 1e-4 * gradient.norm(), name
    assert all(parameter.grad is None for name, parameter in ours.items() if name not in gradients)


def test_the_adapter_is_what_matters(case):
    """Without it the logits are others, or the test above would show nothing."""
    config, model, _ = case
    base = CausalLM(config.model)
    load_pretrained(base, config.model.pretrained)
    ids = document(40, 1)
    with torch.no_grad():
        assert (base(*pack([ids])) - model(*pack([ids]))).abs().max() > 0.1


def test_merged_weights_are_those_that_peft_merges(case, tmp_path):
    config, model, base = case
    alone = publish(export_adapter, config, model, tmp_path / "adapter")
    together = tensors(publish(export, config, model, tmp_path / "hf", dtype="float32"))
    peft.PeftModel.from_pretrained(theirs(base), alone).merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = tensors(tmp_path / "peft")
    assert together.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_merged_bfloat16_base_stays_bfloat16_and_is_rounded_once(tmp_path):
    base = make_checkpoint(tmp_path / "base", "llama 3", torch.bfloat16)
    config = config_of(base, ["q_proj"])
    model = adapted(config)
    before, after = tensors(base), tensors(publish(export, config, model, tmp_path / "hf", dtype="bfloat16"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor
        if name.endswith("q_proj.weight"):
            layer = model.get_submodule(name.removesuffix(".weight"))
            expected = (tensor.double() + 2.5 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()).bfloat16()
        assert after[name].dtype == torch.bfloat16
        assert (after[name] != expected).float().mean() < 1e-3, name  # a tie may fall the other way in fp32


def test_peft_reads_the_config_as_it_was_meant(tmp_path):
    base = make_checkpoint(tmp_path / "base", "llama 3")
    config = config_of(base, dropout=0.25)
    read = peft.PeftConfig.from_pretrained(str(publish(export_adapter, config, adapted(config), tmp_path / "hf")))
    assert (read.r, read.lora_alpha, read.lora_dropout, read.base_model_name_or_path) == (4, 10, 0.25, str(base))
    assert read.target_modules == {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
    assert (read.peft_type, read.task_type, read.bias) == (peft.PeftType.LORA, "CAUSAL_LM", "none")


def test_a_base_from_the_hub_goes_by_its_name():
    directory = "/somewhere/hub/models--some-org--a_model-1B/snapshots/0123abc"
    assert published_name(directory) == ("some-org/a_model-1B", "0123abc")
    assert published_name("/data/models--x/step-4") == ("/data/models--x/step-4", None)


def adapter_of(**lora):
    config = Config(
        model=ModelConfig(**vars(SHAPE) | {"adapter": "lora", "lora": LoRAConfig(**lora)}),
        data=DataConfig(path="unused"),
        trainer=TrainerConfig(device="cpu"),
    )
    model = CausalLM(config.model)
    set_trainable(model, config)
    initialise(model, 3)
    return model


def test_a_new_adapter_changes_nothing_and_its_base_is_that_of_the_seed():
    model, plain = adapter_of(), CausalLM(SHAPE)
    initialise(plain, 3)
    ids = document(30, 1)
    assert torch.equal(model(*pack([ids])), plain(*pack([ids])))
    spread = model.model.layers[0].mlp.down_proj.lora_A.weight
    assert spread.std().item() == pytest.approx((3 * 72) ** -0.5, rel=0.1)  # of peft's uniform distribution up to 1 / sqrt(in)
    assert not torch.equal(spread, model.model.layers[1].mlp.down_proj.lora_A.weight)


def test_dropout_leaves_inputs_of_the_adapter_out_in_training_alone():
    model = adapter_of(rank=3, dropout=0.4, targets="q_proj")
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        x = torch.ones(500, 40)
        torch.manual_seed(0)
        added = layer(x) - F.linear(x, layer.weight)
        torch.manual_seed(0)
        kept = F.dropout(x, 0.4)
        torch.testing.assert_close(added, layer.scale * kept @ layer.lora_A.weight.T @ layer.lora_B.weight.T, rtol=1e-4, atol=1e-4)
        model.eval()
        torch.testing.assert_close(layer(x)[0], F.linear(x[:1], layer.weight + layer.delta())[0], rtol=1e-4, atol=1e-4)


MOE = {"family": "qwen3_moe", "moe": MoEConfig(6, 2, 20)}
MIXED = {"family": "qwen3_moe", "moe": MoEConfig(6, 2, 20, decoder_sparse_step=2)}


@pytest.mark.parametrize(
    ("changes", "targets", "words"),
    [
        ({}, "query", r"no such layer; there are q_proj, k_proj"),
        ({}, ["q_proj", "proj"], "model.lora.targets=proj: there is no such layer"),
        ({}, "lm_head", "lm_head cannot have an adapter"),
        ({}, "embed_tokens", "cannot have an adapter"),
        (MOE, "all-linear", r"experts cannot have adapters here; name the layers that can: \[q_proj, k_proj, v_proj, o_proj\]"),
        (MOE, "experts", "experts cannot have an adapter"),
        (MOE, "gate", "gate cannot have an adapter"),
        (MOE, "gate_proj", "no such layer"),
        (MIXED, "gate_proj", "gate_proj cannot have an adapter"),
    ],
)
def test_targets_that_cannot_be_are_refused_by_name(changes, targets, words):
    model = ModelConfig(**vars(SHAPE) | changes | {"adapter": "lora", "lora": LoRAConfig(targets=targets)})
    with pytest.raises(ConfigError, match=words):
        blueprint(Config(model=model, data=DataConfig(path="unused")))


def trained(freeze, **changes):
    config = Config(model=ModelConfig(**vars(SHAPE) | changes), data=DataConfig(path="unused"), trainer=TrainerConfig(freeze=freeze))
    return {name for name, parameter in blueprint(config).named_parameters() if parameter.requires_grad}


def test_freeze_goes_by_patterns_of_names():
    everything = trained([])
    left = trained(["*embed_tokens*", "model.layers.0.*", "*.layers.?.mlp.*"])
    assert everything - left == {name for name in everything if "embed_tokens" in name or "layers.0" in name or "mlp" in name}
    assert "model.embed_tokens.weight" not in trained(["lm_head*"], tie_word_embeddings=True)  # one weight, two names
    only_b = trained(["*lora_A*"], adapter="lora")
    assert only_b
    assert all(name.endswith("lora_B.weight") for name in only_b)


@pytest.mark.parametrize(
    ("freeze", "words"), [(["*mlp*", "*.layer.*"], r"\*\.layer\.\*.*matches no parameter"), (["*"], "nothing is left to train")]
)
def test_patterns_that_cannot_be_are_refused(freeze, words):
    with pytest.raises(ConfigError, match=words):
        trained(freeze)


@pytest.mark.parametrize(
    ("values", "key"), [({"rank": 0}, "rank"), ({"alpha": 0}, "alpha"), ({"dropout": 1.0}, "dropout"), ({"targets": []}, "targets")]
)
def test_values_out_of_range_are_refused(values, key):
    with pytest.raises(ConfigError, match=f"model.lora.{key}"):
        LoRAConfig(**values)


def test_a_directory_with_an_adapter_alone_is_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="holds an adapter alone"):
        read_hf_config(tmp_path)
