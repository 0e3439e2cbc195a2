"""The YAML groups and the dataclasses hold the same keys, every YAML field has a comment, and every option composes."""

import json
import re
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

from xtuner_hydra.app import App
from xtuner_hydra.config.schema import Config, LoRAConfig
from xtuner_hydra.config.strict import known_keys, to_config, to_yaml
from xtuner_hydra.model.families import hf_config

CONF = Path(__file__).parents[3] / "conf"
GROUPS = [field.name for field in fields(Config)]
OPTIONS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml"))]
REFERENCE = Path(__file__).parent / "default_config.yaml"


def compose(*overrides):
    with App(overrides) as app:
        return app.compose(list(overrides))


@pytest.fixture
def pretrained(tmp_path):
    """A directory that `model=hf` takes its shapes from."""
    values = hf_config(compose("model=smollm2_135m").config.model, "bfloat16", bos_token_id=None, eos_token_id=None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def required(group, option, pretrained):
    """What an option needs besides its name, because it leaves values open."""
    if option in ("hf", "smollm2_sft"):
        return [f"model.pretrained={pretrained}"]
    return ["data.path=x.jsonl"] if option in ("openai", "sharegpt", "alpaca", "prompt_completion") else []


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in GROUPS])
def test_yaml_and_dataclass_have_the_same_keys(group, option):
    loaded = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    assert {group, *flatten(loaded.get(group, loaded), group)} == {
        key for key in known_keys() if key == group or key.startswith(group + ".")
    }


def flatten(section, prefix):
    for name, value in section.items():
        yield f"{prefix}.{name}"
        if value in (None, "???"):  # a group of keys that is not there stands for its keys
            yield from (key for key in known_keys() if key.startswith(f"{prefix}.{name}."))
        if isinstance(value, dict) and name != "params":  # sweep.params holds keys of the whole config
            yield from flatten(value, f"{prefix}.{name}")


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_opens_with_its_command_and_group_fields_have_comments(path):
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert next(line for line in lines if not line.startswith("# @")).startswith("# python -m xtuner_hydra")
    if path.parent.name in GROUPS:
        bare = [line for line in lines if re.match(r"\s*[a-z_]+: \S", line) and "#" not in line]
        assert bare == []


def test_yaml_defaults_are_the_dataclasses_defaults():
    config = compose().config
    for group in fields(Config):
        kind, ours = get_type_hints(Config)[group.name], getattr(config, group.name)
        if group.name in ("model", "data"):  # these have no default of their own
            continue
        plain = {field.name: getattr(kind(), field.name) for field in fields(kind) if not is_dataclass(getattr(ours, field.name))}
        assert {name: getattr(ours, name) for name in plain} == plain


def test_an_adapter_is_the_same_for_every_model():
    for path in CONF.glob("model/*.yaml"):
        model = yaml.safe_load(path.read_text())
        assert (model["adapter"], model["lora"]) == (None, asdict(LoRAConfig())), path
    lora = compose("model.adapter=lora", "model.lora.rank=8", "model.lora.targets=[q_proj,v_proj]").config.model.lora
    assert lora == LoRAConfig(rank=8, targets=["q_proj", "v_proj"])


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group, option, pretrained):
    composition = compose(f"{group}={option}", *required(group, option, pretrained))
    assert composition.choices[group] == option


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in ("experiment", "debug")])
def test_values_of_an_experiment_survive(group, option, pretrained):
    wanted = OmegaConf.load(CONF / group / f"{option}.yaml")
    config = OmegaConf.structured(compose(f"{group}={option}", *required(group, option, pretrained)).config)
    for key in known_keys():
        value = OmegaConf.select(wanted, key)
        if value is not None and not OmegaConf.is_dict(value):
            assert OmegaConf.select(config, key) == value, key


def test_the_command_line_wins_over_an_experiment():
    assert compose("debug=fast", "trainer.total_steps=7").config.trainer.total_steps == 7


def test_resolved_default_config_is_the_committed_reference():
    """When this fails on purpose: python -m xtuner_hydra --cfg job --resolve, and write down why in CHANGELOG.md."""
    text = to_yaml(compose().config)
    examples = str(CONF.parent / "xtuner_hydra" / "examples")
    assert text.replace(examples, "<examples>") == REFERENCE.read_text()


def test_config_yaml_reads_back_as_the_same_config():
    config = compose("optimizer.lr=3e-4", "data.path=[a.jsonl,b.jsonl]").config
    assert to_config(OmegaConf.create(to_yaml(config)), lambda key: "") == config


def test_a_part_of_a_group_that_is_there_can_be_set_alone():
    model = compose("model=llama3_2_1b", "model.rope_scaling.factor=8").config.model
    assert (model.rope_scaling.factor, model.rope_scaling.high_freq_factor) == (8, 4)
    assert compose("model=llama3_2_1b", "model.rope_scaling=null").config.model.rope_scaling is None
    assert compose("model=qwen3_moe_tiny", "model.moe.router_aux_loss_coef=0").config.model.moe.router_aux_loss_coef == 0


@pytest.mark.parametrize(("experts", "changes"), [(False, {}), (True, {"router_aux_loss_coef": 0.25})])
def test_hf_takes_from_the_directory_what_is_left_open(experts, changes, tmp_path):
    """A model without experts has moe=null; with experts a single key of theirs can be set, the others come from config.json."""
    base = compose("model=qwen3_moe_tiny" if experts else "model=llama3_1_8b").config.model
    values = hf_config(base, "bfloat16", bos_token_id=None, eos_token_id=None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    overrides = [f"model.moe.{key}={value}" for key, value in changes.items()]
    model = compose("model=hf", f"model.pretrained={tmp_path}", *overrides, "model.rope_theta=7").config.model
    moe = replace(base.moe, **changes) if experts else None
    assert model == replace(base, moe=moe, rope_theta=7, pretrained=str(tmp_path), tokenizer=None)
