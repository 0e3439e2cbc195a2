"""Llama 2, 3, 3.1, 3.2 and what is built like them (SmolLM2): nothing but the decoder; biases and rotary scaling where config.json says so."""

from xtuner_hydra.model.families.family import Family, biased

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    open={"attention_bias": biased},
    refused={"mlp_bias": False},
    write_switches=lambda model: {"mlp_bias": False},
)
