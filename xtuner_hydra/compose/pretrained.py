"""`model=hf`: what a config leaves open of a model, from the config.json of its pretrained weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from xtuner_hydra.config.schema import MoEConfig, RopeScaling
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.model.hub import local_directory


def fill_from_pretrained(cfg: DictConfig) -> None:
    """`model=hf`: fill what the config leaves open (???) from pretrained/config.json; what was set by hand stays."""
    model = cfg.get("model")
    if not isinstance(model, DictConfig) or model.get("family") != "hf":
        return
    if not model.get("pretrained"):
        raise ConfigError("model.pretrained", None, "model=hf needs model.pretrained=DIR or a Hub id, a Hugging Face model")
    values = read_hf_config(local_directory(str(model.pretrained), config_only=True))
    model.family = values.pop("family")
    _fill(model, {key: asdict(value) if isinstance(value, MoEConfig | RopeScaling) else value for key, value in values.items()})


def _fill(node: DictConfig, values: dict[str, Any]) -> None:
    """Give every open key (???) its value. A group of keys becomes null where there is none and nobody has set a part of it."""
    OmegaConf.set_struct(node, False)
    for key, value in values.items():
        group = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(group, DictConfig) and isinstance(value, dict):
            _fill(group, value)
        elif OmegaConf.is_missing(node, key) or (
            isinstance(group, DictConfig) and all(OmegaConf.is_missing(group, name) for name in group)
        ):
            node[key] = value
