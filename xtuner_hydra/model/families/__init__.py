"""The families of models that the decoder implements: the config.json of each, and what it requires of the decoder.

A family is one file here with a FAMILY in it, listed below. Everything that families share is in `family.py`; reading weights is
`model/pretrained.py`'s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.families import llama, mistral, qwen2, qwen3, qwen3_moe
from xtuner_hydra.model.families.family import Family, HFConfig

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)
}


def family_of(model: ModelConfig) -> Family:
    """The family that `model` names. Raises ConfigError for one that is not here, or that contradicts the config."""
    if model.family not in FAMILIES:
        raise ConfigError("model.family", model.family, f"there is no such family; there are {', '.join(FAMILIES)}")
    family = FAMILIES[model.family]
    family.check(model)
    return family


def read_hf_config(directory: Path | str) -> dict[str, Any]:
    """Values for ModelConfig's fields (`family` and every shape) from `directory`/config.json, in its old or new spelling.

    Raises ConfigError for a directory without one, and names any model type or feature that this decoder lacks."""
    config = HFConfig.read(Path(directory))
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise config.error(f"model_type is {kind}, which is not supported; there are {', '.join(FAMILIES)}")
    return FAMILIES[kind].read(config)


def hf_config(model: ModelConfig, dtype: str, *, bos_token_id: int | None, eos_token_id: int | None) -> dict[str, Any]:
    """config.json for `AutoModelForCausalLM`; `dtype`: of the weights in the files, such as `bfloat16`."""
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    return family_of(model).write(model) | special | {"dtype": dtype, "torch_dtype": dtype}  # the new and the old spelling
