"""Qwen3, dense: RMSNorm on every head's queries and keys."""

from xtuner_hydra.model.families.family import Family, biased, window, write_window

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={"qk_norm": True},
    open={"attention_bias": biased, "sliding_window": window},
    head_dim=128,
    key_value_heads=32,
    write_switches=write_window,
)
