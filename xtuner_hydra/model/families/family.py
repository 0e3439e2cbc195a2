"""What families have in common: config.json read into ModelConfig's fields and written back, nothing taken on trust.

A config.json that asks for something the decoder does not do is rejected by name: a model that loads must give the numbers it was trained
to give. Keys that transformers' class of the family ignores (`pretraining_tp`, ...) are ignored here too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from xtuner_hydra.config.schema import ModelConfig, RopeScaling
from xtuner_hydra.errors import ConfigError

KEY = "model.pretrained"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_SWITCHES: Mapping[str, Any] = {"attention_bias": False, "qkv_bias": False, "qk_norm": False, "sliding_window": None, "moe": None}
_ONLY: Mapping[str, Any] = {"hidden_act": "silu", "attention_dropout": 0, "quantization_config": None, "partial_rotary_factor": 1}
_ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

Piece = tuple[str, tuple[int | slice, ...]]
"""A tensor's name in the files, and where in one of our parameters it stands (an index, whole dimensions left out at the end)."""


def whole(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """The usual case: our modules have Hugging Face's names, and a parameter is one tensor."""
    yield name, ()


class HFConfig:
    """A config.json: values by name, and refusals that name the directory and the key."""

    def __init__(self, directory: Path, values: Mapping[str, Any]) -> None:
        self.directory = directory
        self.values = values

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `directory`/config.json, or raise ConfigError."""
        if not directory.is_dir():
            raise ConfigError(KEY, directory, "there is no such directory; give one that save_pretrained made, or a Hub id (ORG/NAME)")
        if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
            raise ConfigError(KEY, directory, "it holds an adapter alone; export it with checkpoint.hf_merge=true, and give that directory")
        if not (directory / "config.json").is_file():
            raise ConfigError(KEY, directory, "it has no config.json; give a directory that save_pretrained made")
        return cls(directory, read_json(directory, "config.json"))

    def error(self, what: str) -> ConfigError:
        """A fault in config.json, as an exception to raise."""
        return ConfigError(KEY, self.directory, f"config.json: {what}")

    def unsupported(self, what: str) -> ConfigError:
        """A feature that the decoder lacks, as an exception to raise."""
        return self.error(f"{what} is not supported; a model that needs it would not give its own numbers")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key; `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        return int(self._number(name, default, int))

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        return float(self._number(name, default, float))

    def switch(self, name: str) -> bool:
        """true or false; false if it is absent."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self.error(f"{name}={value!r} is neither true nor false")
        return value

    def names(self, name: str) -> list[str]:
        """A list of words; empty if it is absent."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.error(f"{name}={value!r} is not a list of words")
        return value

    def _number(self, name: str, default: float | None, kind: type[int] | type[float]) -> Any:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | kind) or value <= 0:
            problem = f"there is no {name}" if value is None else f"{name}={value!r}"
            raise self.error(f"{problem}; a {'whole ' if kind is int else ''}number above 0 is needed")
        return value


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of a pretrained directory, or ConfigError."""
    try:
        value = json.loads((directory / name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(KEY, directory, f"{name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(KEY, directory, f"{name} is not a JSON object")
    return value


@dataclass(frozen=True)
class Family:
    """What is specific to a family. `name` is config.json's model_type, `architecture` transformers' class."""

    name: str
    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Switches of ModelConfig with one value for all its models; those that its config.json decides are in `open`, the others are off."""
    open: Mapping[str, Callable[[HFConfig], Any]] = field(default_factory=dict)
    """Switches that config.json decides, and how each is read from it."""
    refused: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json for which this decoder supports only one value."""
    head_dim: int | None = None
    """Width of a head if config.json gives none; None: hidden_size / num_attention_heads."""
    key_value_heads: int | None = None
    """Key-value heads if config.json does not give them; None: as many as query heads."""
    write_switches: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    """The keys of config.json beyond the common ones."""
    pieces: Callable[[str, tuple[int, ...]], Iterator[Piece]] = whole
    """(name of a parameter, its shape) -> the tensors in the files that it is made of."""

    def read(self, config: HFConfig) -> dict[str, Any]:
        """ModelConfig's fields from a config.json of this family, or ConfigError with the name of what is not supported."""
        for name, value in {**_ONLY, **self.refused}.items():
            if (found := config.get(name, value)) != value:
                raise config.unsupported(f"{name}={found if not isinstance(found, dict) else '{...}'}")
        sizes = {name: config.size(name) for name in _SIZES}
        return {
            "family": self.name,
            **sizes,
            "num_key_value_heads": self._key_value_heads(config),
            "head_dim": self._head_dim(config),
            "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
            **_read_rope(config),
            "tie_word_embeddings": config.switch("tie_word_embeddings"),
            **_SWITCHES,
            **self.fixed,
            **{name: read(config) for name, read in self.open.items()},
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """config.json of `model`, the rotary settings in the old and the new spelling."""
        scaling = _write_rope(model)
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            **{name: getattr(model, name) for name in _SIZES},
            "num_key_value_heads": model.num_key_value_heads,
            "head_dim": model.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": model.rms_norm_eps,
            "rope_theta": model.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default"} | (scaling or {}) | {"rope_theta": model.rope_theta},
            "tie_word_embeddings": model.tie_word_embeddings,
            **({"attention_bias": model.attention_bias} if "attention_bias" in self.open else {}),
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            **self.write_switches(model),
        }

    def check(self, model: ModelConfig) -> None:
        """ConfigError if a switch of `model` differs from this family's."""
        for name, value in (dict(_SWITCHES) | dict(self.fixed)).items():
            found = getattr(model, name)
            if name not in self.open and found != value:
                shown = {True: "true", False: "false", None: "null"}.get(value)
                raise ConfigError(
                    f"model.{name}",
                    "..." if name == "moe" else str(found).lower(),
                    f"in models of the family {self.name} it is {shown}; set that, or another model.family",
                )
        if "moe" in self.open and model.moe is None:
            raise ConfigError("model.moe", None, f"models of the family {self.name} have experts; set it, or another model.family")

    def _key_value_heads(self, config: HFConfig) -> int:
        named = "num_key_value_heads" in config.values  # null is not absent: it means as many as query heads
        default = self.key_value_heads if self.key_value_heads and not named else config.size("num_attention_heads")
        return config.size("num_key_value_heads", default)

    def _head_dim(self, config: HFConfig) -> int:
        if config.get("head_dim") is not None or self.head_dim is not None:
            return config.size("head_dim", self.head_dim)
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        if hidden % heads:
            raise config.error(f"there is no head_dim, and hidden_size={hidden} is not divisible by num_attention_heads={heads}")
        return hidden // heads


def _read_rope(config: HFConfig) -> dict[str, Any]:
    """rope_theta and rope_scaling, wherever transformers' version put them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise config.error(f"rope_scaling={rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise config.unsupported(f"rope scaling ({kind})")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_TYPES[kind]}
    if others := sorted(rope.keys() - known):
        raise config.unsupported(f"{', '.join(others)} beside rope type {kind}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise config.unsupported(f"partial_rotary_factor={rope['partial_rotary_factor']}")
    settings = HFConfig(config.directory, {"rope_theta": config.get("rope_theta", 1e4)} | rope)
    return {"rope_theta": settings.number("rope_theta"), "rope_scaling": _read_scaling(config, settings, kind)}


def _read_scaling(config: HFConfig, rope: HFConfig, kind: str) -> RopeScaling | None:
    if kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": kind} | {name: rope.number(name) for name in _ROPE_TYPES[kind] if name.endswith("factor")}
    if kind == "llama3":
        fallback = rope.get("original_max_position_embeddings", config.size("max_position_embeddings"))
        scaling["original_max_position_embeddings"] = config.size("original_max_position_embeddings", fallback)
    return RopeScaling(**scaling)


def _write_rope(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    return {name: getattr(scaling, name) for name in ("rope_type", *_ROPE_TYPES[scaling.rope_type])} if scaling else None


def biased(config: HFConfig) -> bool:
    """`attention_bias`: biases on q, k, v and o."""
    return config.switch("attention_bias")


def window(config: HFConfig) -> int | None:
    """Qwen's `sliding_window`: only if `use_sliding_window` is on, and only if every layer has it."""
    layers, used = config.size("num_hidden_layers"), config.switch("use_sliding_window")
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise config.error(f"max_window_layers={first!r} is not a number of layers")
    by_layer = config.names("layer_types") or [
        "sliding_attention" if used and layer >= first else "full_attention" for layer in range(layers)
    ]
    kinds = sorted(set(by_layer))
    if kinds == ["full_attention"]:
        return None
    if kinds == ["sliding_attention"] and used:
        return window_size(config)
    raise config.unsupported(
        f"a mixture of attentions over the layers ({', '.join(kinds)}; use_sliding_window, max_window_layers, layer_types)"
    )


def window_size(config: HFConfig) -> int | None:
    """`sliding_window` of a model that uses it: null means none, and if absent it is 4,096."""
    return config.size("sliding_window", 4096) if config.values.get("sliding_window", 4096) is not None else None


def write_window(model: ModelConfig) -> dict[str, Any]:
    """Qwen's keys for `sliding_window` in every layer, or in none."""
    used = model.sliding_window is not None
    kind = "sliding_attention" if used else "full_attention"
    return {
        "use_sliding_window": used,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0 if used else model.num_hidden_layers,
        "layer_types": [kind] * model.num_hidden_layers,
    }
