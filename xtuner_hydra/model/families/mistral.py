"""Mistral 7B: Llama with a sliding window in every layer (v0.1), or without (v0.2 and later)."""

from xtuner_hydra.model.families.family import Family, HFConfig, window_size


def _window(config: HFConfig) -> int | None:
    """Absent is not null: transformers then uses 4096. With layer_types it treats the model as a Ministral, whose full layers have no window."""
    kinds = set(config.names("layer_types"))
    if len(kinds) > 1:
        raise config.unsupported(f"a mixture of attentions over the layers (layer_types {', '.join(sorted(kinds))})")
    return None if kinds == {"full_attention"} else window_size(config)


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    key_value_heads=8,
    open={"sliding_window": _window},
    write_switches=lambda model: {"sliding_window": model.sliding_window},
)
