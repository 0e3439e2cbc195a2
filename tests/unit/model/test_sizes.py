"""The model groups are the published models: as many parameters, and config.json's values."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xtuner_hydra.app import App
from xtuner_hydra.model.families import hf_config, read_hf_config
from xtuner_hydra.model.transformer import CausalLM

CONF = Path(__file__).parents[3] / "conf" / "model"
# as the model pages count the safetensors; where these hold a tied embedding twice, it is counted once here
PUBLISHED = {
    "qwen3_0p6b": 751_632_384 - 151936 * 1024,
    "qwen3_1p7b": 2_031_739_904 - 151936 * 2048,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen2_5_0p5b": 494_032_768,
    "qwen2_5_1p5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1p7b": 1_711_376_384,
    "mistral_7b": 7_248_023_552,
}
CONFIGS = json.loads((Path(__file__).parent / "published_configs.json").read_text())
OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "hf")


def compose(option):
    overrides = [f"model={option}"]
    with App(overrides) as app:
        return app.compose(overrides).config.model


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("option", PUBLISHED)
def test_a_published_size_has_its_parameters(option):
    assert parameters(meta(lambda: CausalLM(compose(option)))) == PUBLISHED[option]


@pytest.mark.parametrize("option", OPTIONS)
def test_the_comment_gives_the_parameters(option):
    model = compose(option)
    count = parameters(meta(lambda: CausalLM(model)))
    comment = (CONF / f"{option}.yaml").read_text().splitlines()[1]
    assert f"{count / 1e6:.2f} M parameters" in comment
    if model.moe:
        idle = (model.moe.num_experts - model.moe.num_experts_per_tok) * 3 * model.hidden_size * model.moe.moe_intermediate_size
        sparse = sum(map(model.has_experts, range(model.num_hidden_layers)))
        assert f"{(count - sparse * idle) / 1e6:.2f} M of them" in comment


@pytest.mark.parametrize("option", OPTIONS)
def test_transformers_builds_the_same_shapes_from_our_config(option):
    model = compose(option)
    values = hf_config(model, "bfloat16", bos_token_id=None, eos_token_id=None)
    theirs = meta(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)))
    ours = meta(lambda: CausalLM(model))
    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == {
        name: parameter.shape for name, parameter in theirs.named_parameters()
    }


@pytest.mark.parametrize("option", CONFIGS)
def test_an_option_has_the_values_of_the_published_config(option, tmp_path):
    """published_configs.json holds what the models' own config.json say of the numbers, in the spelling of their time."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[option]))
    model = compose(option)
    for name, value in read_hf_config(tmp_path).items():
        assert getattr(model, name) == value, name
