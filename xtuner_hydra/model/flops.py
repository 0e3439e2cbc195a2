"""How many floating-point operations a training step needs, counted from shapes."""

from __future__ import annotations

from collections.abc import Iterable

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.model.adapters import ALL, fits, target_names


def training_flops(model: ModelConfig, document_lengths: Iterable[int], supervised_tokens: int) -> float:
    """FLOPs of forward and backward pass over packed documents, recomputation not counted.

    Matrix products only: 2 a weight and token in the layers, of experts those that a token goes to; 2 a weight at supervised positions in
    the head and the last layer's MLP, the only ones that they work for; in attention 4 a head dimension and pair of positions that see each
    other (Kaplan et al. 2020, section 2.1, with causal pairs). The backward pass takes as many for the inputs' gradients and as many again
    for the weights', which those under an adapter do not have; what trainer.freeze saves is not taken off."""
    lengths = list(document_lengths)
    tokens, layers = sum(lengths), range(model.num_hidden_layers)
    last_mlp = f"model.layers.{model.num_hidden_layers - 1}.mlp."
    parts = [
        (name, shape, supervised_tokens if name.startswith(last_mlp) else tokens)
        for layer in layers
        for name, shape in _linear(model, layer).items()
    ]
    weights = sum(inner * outer * seen for _, (inner, outer), seen in parts)
    weights += sum(_expert_weights(model, layer) for layer in layers) * tokens
    weights += model.hidden_size * model.vocab_size * supervised_tokens
    adapters = sum(model.lora.rank * sum(shape) * seen for name, shape, seen in parts if _has_adapter(model, name))
    queries = model.num_attention_heads * model.head_dim
    attention = 2 * model.num_hidden_layers * queries * sum(_pairs(length, model.sliding_window) for length in lengths)
    passes = 3 if model.adapter is None else 2
    return float(2 * (passes * weights + 3 * (adapters + attention)))


def _expert_weights(model: ModelConfig, layer: int) -> int:
    """Weights that a token is multiplied with in a layer's router and in each of the experts that it goes to."""
    if model.moe is None or not model.has_experts(layer):
        return 0
    return model.hidden_size * (3 * model.moe.num_experts_per_tok * model.moe.moe_intermediate_size + model.moe.num_experts)


def _has_adapter(model: ModelConfig, name: str) -> bool:
    return model.adapter is not None and any(target == ALL or fits(name, target) for target in target_names(model.lora))


def _linear(model: ModelConfig, layer: int) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's linear parts by their full names, experts apart."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    shapes = {"self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys), "self_attn.v_proj": (hidden, keys)}
    shapes |= {"self_attn.o_proj": (queries, hidden)}
    if not model.has_experts(layer):
        shapes |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, in a document."""
    unseen = max(0, length - window) if window else 0
    return length * (length + 1) // 2 - unseen * (unseen + 1) // 2
