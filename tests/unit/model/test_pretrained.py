"""What a directory of weights may look like, and what is refused, by name and before anything is built."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from parity import CASES, change_config, make_checkpoint, ours, same_logits, tensors, theirs
from safetensors.torch import save_file

from xtuner_hydra.config.schema import ModelConfig, RopeScaling
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.pretrained import check_pretrained, load_pretrained, pretrained_dtype, refuse_other_settings
from xtuner_hydra.model.transformer import CausalLM


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    parent = tmp_path_factory.mktemp("originals")
    return {case: make_checkpoint(parent / case, case) for case in ("llama 3", "smollm2", "qwen3_moe")}


@pytest.fixture
def copy(originals, tmp_path):
    """case -> a copy of its checkpoint to spoil."""

    def of(case):
        return shutil.copytree(originals[case], tmp_path / case)

    return of


def write(directory, weights):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors", metadata={"format": "pt"})


def config_of(directory, **changes):
    return ModelConfig(**read_hf_config(directory) | {"pretrained": str(directory)} | changes)


def refusal(directory, **changes):
    with pytest.raises(ConfigError) as caught:
        check_pretrained(config_of(directory, **changes))
    return str(caught.value)


@pytest.mark.parametrize("case", ["llama 3", "smollm2", "qwen3_moe"])
def test_a_whole_directory_is_not_refused(originals, case):
    check_pretrained(config_of(originals[case]))


@pytest.mark.parametrize("case", CASES)
def test_the_settings_of_the_directory_itself_differ_in_nothing(tmp_path, case, caplog):
    refuse_other_settings(config_of(make_checkpoint(tmp_path, case)), [])
    assert not caplog.records


@pytest.mark.parametrize(
    ("case", "changes", "key"),
    [
        ("llama 3", {"rope_theta": 12345.0}, "model.rope_theta"),
        ("llama 3", {"rope_scaling": RopeScaling("linear", factor=2.0)}, "model.rope_scaling"),
        ("llama 3", {"rms_norm_eps": 1e-2}, "model.rms_norm_eps"),
        ("smollm2", {"sliding_window": 8}, "model.sliding_window"),
        ("smollm2", {"num_attention_heads": 1}, "model.num_attention_heads"),
    ],
)
def test_other_settings_than_the_weights_were_trained_with_are_refused_unless_meant(originals, case, changes, key, caplog):
    other = config_of(originals[case], **changes)
    check_pretrained(config_of(originals[case]))  # tensors do not show it
    with pytest.raises(ConfigError, match=f"{key}=.*were trained with .*model=hf takes such settings from there"):
        refuse_other_settings(other, ["model=llama3_2_1b", "model.vocab_size=9"])
    refuse_other_settings(other, [f"{key}=1"])
    assert f"trained with other settings than {key}=" in caplog.text


def test_experts_that_a_token_goes_to_are_settings_too(originals):
    config = config_of(originals["qwen3_moe"])
    config.moe = replace(config.moe, num_experts_per_tok=config.moe.num_experts_per_tok + 1)
    with pytest.raises(ConfigError, match=r"model\.moe\.num_experts_per_tok"):
        refuse_other_settings(config, [])
    refuse_other_settings(config, ["++model.moe.num_experts_per_tok=3"])


def test_missing_unexpected_and_misshapen_weights_are_listed_and_refused(copy):
    directory = copy("llama 3")
    weights = tensors(directory)
    del weights["model.layers.0.self_attn.q_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(60)
    weights["model.norm.weight"] = torch.ones(47)
    write(directory, weights)
    for words in (
        "missing: model.layers.0.self_attn.q_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight is (47,), not (48,)",
        "model.strict=false",
    ):
        assert words in refusal(directory)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        load_pretrained(CausalLM(config_of(directory)), directory)


def test_a_missing_expert_is_named(copy):
    directory = copy("qwen3_moe")
    weights = tensors(directory)
    del weights["model.layers.1.mlp.experts.4.up_proj.weight"]
    write(directory, weights)
    assert "missing: model.layers.1.mlp.experts.4.up_proj.weight" in refusal(directory)


def test_strict_false_tolerates_what_it_names(copy, caplog):
    directory = copy("qwen3_moe")
    weights = tensors(directory)
    missing = "model.layers.1.mlp.experts.4.up_proj.weight"
    expected = weights.pop(missing)
    weights["classifier.weight"] = torch.zeros(2, 2)
    weights["model.norm.weight"] = torch.ones(47)
    write(directory, weights)
    config = config_of(directory, strict=False)
    check_pretrained(config)
    model, initial = CausalLM(config), CausalLM(config)
    initialise(initial, 5)
    with caplog.at_level(logging.WARNING, logger="xtuner_hydra"):
        load_pretrained(model, directory, seed=5)
    for name in (missing, "classifier.weight", "model.norm.weight"):
        assert name in caplog.text
    found, before = (one.model.layers[1].mlp.experts.gate_up_proj for one in (model, initial))
    assert torch.equal(found[4, 20:], before[4, 20:])
    assert not torch.equal(found[4, 20:], expected)
    assert torch.equal(found[4, :20], weights["model.layers.1.mlp.experts.4.gate_proj.weight"])
    assert torch.equal(found[3, 20:], weights["model.layers.1.mlp.experts.3.up_proj.weight"])
    assert torch.equal(model.model.norm.weight, initial.model.norm.weight)


def test_several_files_with_an_index(copy):
    directory = copy("llama 3")
    theirs(directory).save_pretrained(directory / "split", max_shard_size="40KB")
    assert len(list((directory / "split").glob("*.safetensors"))) > 2
    same_logits(directory, ours(directory / "split"))
    next(iter(sorted((directory / "split").glob("*.safetensors")))).unlink()
    assert "it lacks model-00001-of" in refusal(directory / "split")
    (directory / "split" / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 1}}')
    assert "names 1; weights are files" in refusal(directory / "split")


def test_an_index_that_is_left_over_beside_a_single_file_is_passed_over(copy):
    """As transformers leaves one where it saves a model again, in one file, and passes over it too."""
    directory = copy("llama 3")
    model = theirs(directory)
    model.save_pretrained(directory / "again", max_shard_size="40KB")
    with torch.no_grad():
        model.lm_head.weight *= 2
    model.save_pretrained(directory / "again")
    assert (directory / "again" / "model.safetensors.index.json").exists()
    same_logits(directory / "again", ours(directory / "again"))


def test_a_file_cut_short_is_refused(copy):
    directory = copy("llama 3")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors cannot be read" in refusal(directory)


def test_pickles_are_refused_with_the_way_to_convert_them(copy):
    directory = copy("llama 3")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    text = refusal(directory)
    assert "pickled (.bin)" in text
    assert "save_pretrained" in text


def test_quantised_weights_are_refused(copy):
    directory = copy("llama 3")
    write(directory, {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors(directory).items()})
    assert "F8_E4M3" in refusal(directory)


def test_a_tied_head_may_stand_in_the_files_if_it_is_the_embedding(copy):
    directory = copy("smollm2")
    weights = tensors(directory)
    assert "lm_head.weight" not in weights
    head = weights["model.embed_tokens.weight"].clone()
    write(directory, weights | {"lm_head.weight": head})
    check_pretrained(config_of(directory))
    same_logits(directory, ours(directory))
    head[96, 3] += 1
    write(directory, weights | {"lm_head.weight": head})
    assert "model.tie_word_embeddings=false" in refusal(directory)
    check_pretrained(config_of(directory, tie_word_embeddings=False))
    assert torch.equal(ours(directory, tie_word_embeddings=False).lm_head.weight, head)


def test_an_untied_model_without_a_head_is_refused_with_the_remedy(copy):
    directory = copy("smollm2")
    change_config(directory, tie_word_embeddings=False)
    text = refusal(directory)
    assert "missing: lm_head.weight" in text
    assert "model.tie_word_embeddings=true" in text


def test_frequencies_that_old_checkpoints_hold_are_left_alone(copy):
    directory = copy("llama 3")
    write(directory, tensors(directory) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    check_pretrained(config_of(directory))
    same_logits(directory, ours(directory))


def test_experts_in_the_layout_of_memory_are_read_too(originals, copy):
    directory = copy("qwen3_moe")
    fused = {name: parameter.detach() for name, parameter in theirs(directory).named_parameters()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    write(directory, fused)
    check_pretrained(config_of(directory))
    same_logits(originals["qwen3_moe"], ours(directory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_files(tmp_path, dtype):
    directory = make_checkpoint(tmp_path, "llama 3", dtype)
    assert pretrained_dtype(directory) == str(dtype).removeprefix("torch.")


UNSUPPORTED = {  # the case, keys of config.json that change the numbers, and the word for it
    "a family": ("llama 3", {"model_type": "gpt_neox"}, "model_type is gpt_neox"),
    "yarn": ("llama 3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope scaling (yarn)"),
    "dynamic, old spelling": ("llama 3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling (dynamic)"),
    "mrope": ("qwen3", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 2], "rope_theta": 1e4}}, "mrope_section"),
    "a theta for each kind of layer": ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "partial rotation": ("llama 3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "partial rotation, new spelling": (
        "llama 3",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "dropout": ("mistral", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "bias in the MLP": ("llama 3", {"mlp_bias": True}, "mlp_bias=True"),
    "another activation": ("qwen2", {"hidden_act": "gelu"}, "hidden_act=gelu"),
    "quantisation": ("llama 3", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
        "a mixture of attentions",
    ),
    "layer types": ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    "layer types of Mistral": ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "no width of a head": ("llama 2", {"head_dim": None, "num_attention_heads": 7}, "not divisible"),
    "no size": ("llama 2", {"hidden_size": None}, "there is no hidden_size"),
    "a family that is no word": ("llama 2", {"model_type": ["llama"]}, "which is not supported"),
    "scaling that is no object": ("llama 2", {"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
    "a kind of scaling that is no word": ("llama 2", {"rope_scaling": {"rope_type": ["linear"]}}, "rope scaling (['linear'])"),
    "layer types that are no list": ("qwen3", {"layer_types": 5}, "layer_types=5 is not a list of words"),
    "layer types of Mistral that are no list": ("mistral", {"layer_types": 5}, "layer_types=5 is not a list of words"),
    "layers that are no number": ("qwen2", {"max_window_layers": "all"}, "max_window_layers='all' is not a number"),
    "half a layer": ("llama 2", {"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
    "llama3 without a factor": ("llama 3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "there is no low_freq_factor"),
}


def test_a_mistral_of_full_layers_has_no_window(tmp_path):
    """As transformers has it, which takes one with layer_types for a Ministral."""
    make_checkpoint(tmp_path, "mistral")
    assert read_hf_config(tmp_path)["sliding_window"] == 13
    change_config(tmp_path, layer_types=["full_attention"] * read_hf_config(tmp_path)["num_hidden_layers"])
    assert read_hf_config(tmp_path)["sliding_window"] is None


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_the_decoder_does_not_do_is_refused_by_name(tmp_path, what):
    case, changes, words = UNSUPPORTED[what]
    make_checkpoint(tmp_path, case)
    (tmp_path / "model.safetensors").unlink()  # before anything is loaded
    read_hf_config(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        read_hf_config(tmp_path)
    assert words in str(caught.value)
    assert caught.value.key == "model.pretrained"


SPELLINGS = {  # new keys, the same in older config.json, and what they say
    "theta": ("llama 3", {"rope_parameters": {"rope_theta": 4e5, "rope_type": "default"}}, {"rope_theta": 4e5}),
    "linear": (
        "llama 3",
        {"rope_parameters": {"rope_theta": 4e5, "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 4e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "llama3": (
        "llama 3.2",
        {"rope_parameters": {"rope_theta": 5e3, "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4,
                             "original_max_position_embeddings": 64}},
        {"rope_theta": 5e3, "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4,
                                             "original_max_position_embeddings": 64}},
    ),
    "experts": ("qwen3_moe", {"num_local_experts": 6}, {"num_experts": 6}),
    "heads": ("llama 2", {"num_key_value_heads": 6, "head_dim": 8}, {}),
    "window": ("qwen2", {"use_sliding_window": False, "sliding_window": None}, {"use_sliding_window": False, "sliding_window": 16}),
}  # fmt: skip


@pytest.mark.parametrize("what", SPELLINGS)
def test_old_and_new_spellings_say_the_same(tmp_path, what):
    case, new, old = SPELLINGS[what]
    make_checkpoint(tmp_path, case)
    path = tmp_path / "config.json"
    other = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("rope_parameters", *new)}
    if case == "llama 2":
        other["hidden_size"] = 48
    theta = {"rope_theta": 1e4} if "rope_parameters" not in new else {}
    read = []
    for keys in (theta | new, theta | old):
        path.write_text(json.dumps(other | keys))
        read.append(read_hf_config(tmp_path))
    assert read[0] == read[1]


def test_mistral_without_the_key_has_a_window_and_with_null_none(tmp_path):
    make_checkpoint(tmp_path, "mistral")
    assert read_hf_config(tmp_path)["sliding_window"] == 13
    change_config(tmp_path, sliding_window=None)
    assert read_hf_config(tmp_path)["sliding_window"] is None
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(tmp_path)["sliding_window"] == 4096  # as MistralConfig has it


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_window_that_is_used_and_null_is_none(tmp_path, case):
    make_checkpoint(tmp_path, case)
    for value, expected in ((16, 16), (None, None)):
        change_config(tmp_path, use_sliding_window=True, max_window_layers=0, layer_types=None, sliding_window=value)
        assert read_hf_config(tmp_path)["sliding_window"] == expected


@pytest.mark.parametrize(
    ("case", "changes", "key"),
    [
        ("llama 3", {"qk_norm": True}, "model.qk_norm"),
        ("llama 3", {"sliding_window": 8}, "model.sliding_window"),
        ("qwen2", {"qkv_bias": False}, "model.qkv_bias"),
        ("qwen3", {"qk_norm": False}, "model.qk_norm"),
        ("qwen3_moe", {"moe": None}, "model.moe"),
        ("qwen3_moe", {"family": "qwen3"}, "model.moe"),
        ("mistral", {"attention_bias": True}, "model.attention_bias"),
        ("mistral", {"family": "gpt2"}, "model.family"),
    ],
)
def test_a_config_that_its_family_cannot_be_is_refused(tmp_path, case, changes, key):
    """Or the export would be a model that transformers builds otherwise."""
    make_checkpoint(tmp_path, case)
    with pytest.raises(ConfigError) as caught:
        check_pretrained(ModelConfig(**read_hf_config(tmp_path) | changes))
    assert caught.value.key == key


def test_every_family_has_a_case():
    from xtuner_hydra.model.families import FAMILIES

    assert {family for family, _ in CASES.values()} == set(FAMILIES)
