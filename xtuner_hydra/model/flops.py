"""How many floating-point operations a training step needs, counted from shapes."""

from __future__ import annotations

from collections.abc import Iterable

from xtuner_hydra.config.schema import ModelConfig


def training_flops(model: ModelConfig, document_lengths: Iterable[int], supervised_tokens: int) -> float:
    """FLOPs of forward and backward pass (twice the forward's) over packed documents, recomputation not counted.

    Matrix products only: 2 a weight and token in the layers, of experts those that a token goes to; 2 a weight at supervised positions in
    the head, the only ones it is asked for; in attention 4 a head dimension and pair of positions that see each other (Kaplan et al. 2020,
    section 2.1, with causal pairs)."""
    lengths = list(document_lengths)
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    weights = model.num_hidden_layers * model.hidden_size * (2 * queries + 2 * keys)
    weights += sum(_mlp_weights(model, layer) for layer in range(model.num_hidden_layers))
    pairs = sum(_pairs(length, model.sliding_window) for length in lengths)
    forward: float = 2 * weights * sum(lengths)
    forward += 4 * model.num_hidden_layers * queries * pairs
    forward += 2 * model.hidden_size * model.vocab_size * supervised_tokens
    return 3 * forward


def _mlp_weights(model: ModelConfig, layer: int) -> int:
    """Weights after the attention that a token is multiplied with: gate, up and down; with experts, of each it goes to, and the router."""
    if model.moe is None or not model.has_experts(layer):
        return 3 * model.hidden_size * model.intermediate_size
    return model.hidden_size * (3 * model.moe.num_experts_per_tok * model.moe.moe_intermediate_size + model.moe.num_experts)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, in a document."""
    unseen = max(0, length - window) if window else 0
    return length * (length + 1) // 2 - unseen * (unseen + 1) // 2
