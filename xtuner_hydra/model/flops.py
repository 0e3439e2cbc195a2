"""How many floating-point operations a training step needs, counted from shapes."""

from __future__ import annotations

from collections.abc import Iterable

from xtuner_hydra.config.schema import ModelConfig


def training_flops(model: ModelConfig, document_lengths: Iterable[int], supervised_tokens: int) -> float:
    """FLOPs of forward and backward pass (twice the forward's) over packed documents, recomputation not counted.

    Matrix products only: 2 a weight and token in the layers; 2 a weight at supervised positions in the head, the only ones it is asked for;
    in attention 4 a head dimension and pair of positions, half of them masked (Kaplan et al. 2020, section 2.1, with causal pairs)."""
    lengths = list(document_lengths)
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    layer = model.hidden_size * (2 * queries + 2 * keys + 3 * model.intermediate_size)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    forward: float = 2 * model.num_hidden_layers * layer * sum(lengths)
    forward += 4 * model.num_hidden_layers * queries * pairs
    forward += 2 * model.hidden_size * model.vocab_size * supervised_tokens
    return 3 * forward
