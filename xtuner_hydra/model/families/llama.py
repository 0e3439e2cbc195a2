"""Llama 2, 3, 3.1, 3.2 and models built like them (SmolLM2): the plain decoder; biases and rotary scaling if config.json says so."""

from xtuner_hydra.model.families.family import Family, biased

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    open={"attention_bias": biased},
    refused={"mlp_bias": False},
    write_switches=lambda model: {"mlp_bias": False},
)
