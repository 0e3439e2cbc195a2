"""An adapter in its own directory, as peft and our export save it: adapter_config.json -> its shape and its base,
adapter_model.safetensors -> into the model that has it.

What is not LoRA as adapters.py adds it (DoRA, rank-stabilised scaling, other ranks for some layers, ...) is rejected by name: it would
give other numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from xtuner_hydra.config.schema import LoRAConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.adapters import ALL, is_adapter
from xtuner_hydra.model.families.family import KEY, read_json
from xtuner_hydra.model.hub import local_directory
from xtuner_hydra.model.init import assign
from xtuner_hydra.model.pretrained import some_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's, before the base's own names
_READ = {
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "init_lora_weights",
}
# keys that do not affect the numbers, or only together with another key
_IDLE = {"task_type", "inference_mode", "peft_version", "auto_mapping", "runtime_config", "megatron_core", "qalora_group_size"}
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # initial values of an adapter; others change the base's weights as well


def read_adapter(directory: Path) -> tuple[Path, LoRAConfig]:
    """(the directory of its base, the adapter) of a directory with an adapter_config.json; a base on the Hub is downloaded.

    Raises ConfigError for an adapter that is not supported, and if the base is not available."""
    values = read_json(directory, CONFIG)
    _refuse_other_kinds(directory, values)
    try:
        lora = LoRAConfig(int(values["r"]), float(values["lora_alpha"]), float(values.get("lora_dropout") or 0), _targets(values))
    except (KeyError, TypeError, ValueError) as error:
        raise _fault(directory, f"r, lora_alpha, lora_dropout, target_modules cannot be read ({error!r})") from None
    base = values.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise _fault(directory, "there is no base_model_name_or_path, the model that the adapter belongs to")
    found = local_directory(base, revision=values.get("revision")).resolve()
    if not found.is_dir():
        raise _fault(directory, f"its base, base_model_name_or_path={base}, does not exist; put it back, or enter its present path")
    return found, lora


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Fill the parameters of an adapter (plain or DTensor) from a directory. ConfigError if names or shapes do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(KEY, directory, f"{WEIGHTS} cannot be read ({error}); is it complete?") from None
    wanted = {f"{_PREFIX}{name}": parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    faults = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - wanted.keys()),
        "other shape": sorted(name for name in wanted.keys() & stored.keys() if wanted[name].shape != stored[name].shape),
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {some_of(names)}" for kind, names in faults.items() if names)
        raise ConfigError(KEY, directory, f"{WEIGHTS} does not fit {CONFIG} and the base ({told})")
    for name, parameter in wanted.items():
        assign(parameter.detach(), stored[name])


def _refuse_other_kinds(directory: Path, values: Mapping[str, Any]) -> None:
    if (kind := values.get("peft_type")) != "LORA":
        raise _fault(directory, f"peft_type is {kind}; only LORA is supported")
    if (bias := values.get("bias", "none")) != "none":
        raise _fault(directory, f"bias={bias} is not supported")
    if (start := values.get("init_lora_weights")) not in _KEEPS_BASE:
        raise _fault(directory, f"init_lora_weights={start} is not supported: it changes the base's own weights too")
    if others := [name for name, value in values.items() if value and name not in _READ | _IDLE]:
        raise _fault(directory, f"{', '.join(others)} is not supported; an adapter that needs it would not give its own numbers")


def _targets(values: Mapping[str, Any]) -> list[str] | str:
    targets = values["target_modules"]
    if isinstance(targets, str) and targets != ALL:
        raise ValueError(f"target_modules={targets}, a pattern; a list of names is needed")
    return targets if isinstance(targets, str) else list(targets)


def _fault(directory: Path, what: str) -> ConfigError:
    return ConfigError(KEY, directory, f"{CONFIG}: {what}")
