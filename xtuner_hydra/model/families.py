"""Hugging Face directories <-> our model: config.json both ways, and reading safetensors.

Our modules carry Hugging Face's names, so the weights need no renaming. What a config asks for and this decoder does not do is refused by
name: a model that loads must give the numbers it was trained to give."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.init import assign
from xtuner_hydra.model.transformer import CausalLM

_KEY = "model.pretrained"
_SHAPES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_hf_config(directory: Path | str) -> dict[str, Any]:
    """Values for ModelConfig's fields (`family` and every shape) from `directory`/config.json, in its old and new spellings.

    Raises ConfigError for a directory without one, and by name for a model or a feature that this decoder does not have."""
    config = _read_config(Path(directory))
    _refuse_unsupported(directory, config)
    values = {name: _number(directory, config, name, int) for name in _SHAPES}
    config = {"head_dim": 128, "rms_norm_eps": 1e-6} | config  # Qwen3Config's defaults
    return values | {
        "family": "qwen3",
        "head_dim": _number(directory, config, "head_dim", int),
        "rms_norm_eps": _number(directory, config, "rms_norm_eps", float),
        "rope_theta": _number(directory, config | _rope(config), "rope_theta", float),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "attention_bias": bool(config.get("attention_bias", False)),
        "qk_norm": True,
    }


def hf_config(model: ModelConfig, dtype: str, *, bos_token_id: int | None, eos_token_id: int | None) -> dict[str, Any]:
    """config.json for `AutoModelForCausalLM`; `dtype`: of the weights in the files, such as `bfloat16`.

    Without qk_norm the architecture is Llama's, module names included."""
    family, architecture = ("qwen3", "Qwen3ForCausalLM") if model.qk_norm else ("llama", "LlamaForCausalLM")
    return {
        "architectures": [architecture],
        "model_type": family,
        **{name: getattr(model, name) for name in _SHAPES},
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        # the old and the new spelling of the same
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def check_pretrained(config: ModelConfig) -> None:
    """Read the headers in `config.pretrained`: ConfigError where its files, names, shapes or dtypes do not fit, before anything is built."""
    if config.pretrained is None:
        return
    _read_config(Path(config.pretrained))
    with torch.device("meta"):
        model = CausalLM(config)
    _fitting_files(model, config.pretrained)
    pretrained_dtype(config.pretrained)


def load_pretrained(model: CausalLM, directory: Path | str) -> None:
    """Fill every parameter (plain or DTensor) from the directory's safetensors, one tensor in memory at a time.

    Raises ConfigError before anything is filled where names or shapes differ, or the weights are in another format."""
    parameters = dict(model.named_parameters())
    for file in _fitting_files(model, directory):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name in parameters:  # a tied head may stand there a second time
                    assign(parameters[name], tensors.get_tensor(name))


def pretrained_dtype(directory: Path | str) -> str:
    """`float32`, `bfloat16` or `float16`: the dtype of the weights in the directory's safetensors (the embedding's)."""
    for file in _weight_files(Path(directory)):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name == "model.embed_tokens.weight":
                    kind = tensors.get_slice(name).get_dtype()
                    if kind not in _DTYPES:
                        raise ConfigError(_KEY, directory, f"its weights are {kind}; only {', '.join(_DTYPES.values())} can be trained")
                    return _DTYPES[kind]
    raise ConfigError(_KEY, directory, "its safetensors hold no model.embed_tokens.weight; is this a Qwen3 checkpoint?")


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise ConfigError(
            _KEY,
            directory,
            "there is no such directory; give one that save_pretrained made (Hub ids are not supported yet: download it first)",
        )
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(_KEY, directory, "it has no config.json; give a directory that save_pretrained made")
    return _read_json(directory, path)


def _read_json(directory: Path | str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(_KEY, directory, f"{path.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(_KEY, directory, f"{path.name} is not a JSON object")
    return value


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, wherever this version of transformers put them; {} where there are none."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_unsupported(directory: Path | str, config: dict[str, Any]) -> None:
    def refuse(what: str) -> ConfigError:
        return ConfigError(_KEY, directory, f"config.json has {what}, which is not supported; only dense Qwen3 models without it are")

    if (kind := config.get("model_type")) != "qwen3":
        raise ConfigError(_KEY, directory, f"model_type is {kind}; only qwen3 is supported")
    rope = _rope(config)
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise refuse(f"rope scaling ({scaling})")
    if config.get("use_sliding_window"):
        raise refuse("use_sliding_window=true")
    if others := sorted(set(config.get("layer_types") or []) - {"full_attention"}):
        raise refuse(f"layer_types {', '.join(others)}")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise refuse(f"hidden_act={activation}")
    if dropout := config.get("attention_dropout"):
        raise refuse(f"attention_dropout={dropout}")
    if config.get("quantization_config"):
        raise refuse("quantization_config (quantised weights)")


def _number(directory: Path | str, config: dict[str, Any], name: str, kind: type[int] | type[float]) -> Any:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | kind) or value <= 0:
        problem = f"has no {name}" if value is None else f"has {name}={value!r}"
        raise ConfigError(_KEY, directory, f"config.json {problem}; a {'whole ' if kind is int else ''}number above 0 is needed")
    return kind(value)


def _fitting_files(model: CausalLM, directory: Path | str) -> list[Path]:
    """The directory's safetensors, which hold exactly the parameters of `model`, or ConfigError."""
    files = _weight_files(Path(directory))
    shapes = _shapes(files)
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)  # some files hold the embedding a second time
    _check_names(directory, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, shapes)
    return files


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files, by the index where there is one."""
    if (index := directory / _INDEX).is_file():
        names = _read_json(directory, index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ConfigError(_KEY, directory, f"{_INDEX} has no weight_map")
        files = [directory / name for name in sorted(set(names.values()))]
    else:
        files = [directory / _SINGLE]
    if missing := [file.name for file in files if not file.is_file()]:
        if list(directory.glob("pytorch_model*.bin")):
            raise ConfigError(
                _KEY,
                directory,
                "its weights are pickled (.bin), which are not read; convert them with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
            )
        raise ConfigError(_KEY, directory, f"it lacks {_some(missing)}; is the download complete?")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(_KEY, file.parent, f"{file.name} cannot be read ({error}); is the download complete?") from None


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _open(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _check_names(directory: Path | str, ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> None:
    problems = []
    if missing := sorted(ours.keys() - theirs.keys()):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(theirs.keys() - ours.keys()):
        problems.append(f"unexpected: {_some(unexpected)}")
    if misshapen := [
        f"{name} is {theirs[name]}, not {ours[name]}" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]
    ]:
        problems.append(f"other shape: {_some(misshapen)}")
    if problems:
        raise ConfigError(
            _KEY,
            directory,
            f"its weights do not fit the model config ({'; '.join(problems)}); model=hf takes every shape from the directory's config.json",
        )


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
