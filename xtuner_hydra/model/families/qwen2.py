"""Qwen2 and Qwen2.5: biases on queries, keys and values, not on the output. The width of a head is derived, never assumed."""

from xtuner_hydra.model.families.family import Family, window, write_window

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    key_value_heads=32,
    fixed={"qkv_bias": True},
    open={"sliding_window": window},
    write_switches=write_window,
)
