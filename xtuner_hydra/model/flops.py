"""How many floating-point operations a training step needs, counted from shapes and from what is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.model.adapters import ALL, LORA_A, LORA_B, fits, target_names


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of the forward and backward pass over packed documents, recomputation not counted.

    Matrix products only: 2 per weight and token in the layers, for experts only those that a token goes to; 2 per weight and supervised token in
    the head and the last layer's MLP, which are computed at these only; in attention 4 per head dimension and pair of positions that see each
    other (Kaplan et al. 2020, section 2.1, with causal pairs). The backward pass takes as many again for a trained weight, and as many for an
    input that has a gradient, that is if anything before it is trained.

    per_token, per_label, per_pair: for each token, supervised token, and pair of positions that see each other. window: of the attention, in
    tokens."""

    per_token: int
    per_label: int
    per_pair: int
    window: int | None

    def of(self, document_lengths: Iterable[int], supervised_tokens: int) -> float:
        """FLOPs of one micro-batch."""
        lengths = list(document_lengths)
        pairs = sum(_pairs(length, self.window) for length in lengths)
        return float(self.per_token * sum(lengths) + self.per_label * supervised_tokens + self.per_pair * pairs)


def training_flops(model: ModelConfig, trained: Collection[str]) -> TrainingFlops:
    """Count them for a model whose parameters named in `trained` are trained."""
    token = label = pair = 0
    queries = model.num_attention_heads * model.head_dim
    has_gradient = "model.embed_tokens.weight" in trained
    for layer in range(model.num_hidden_layers):
        name = f"model.layers.{layer}"
        has_gradient |= f"{name}.input_layernorm.weight" in trained
        token += sum(_linear(model, trained, *part, has_gradient) for part in _projections(model, f"{name}.self_attn"))
        has_gradient |= _holds(trained, *(f"{name}.self_attn.{part}_" for part in "qkv"))  # projections and norms
        pair += 2 * queries * (1 + 2 * has_gradient)
        token += _linear(model, trained, f"{name}.self_attn.o_proj", queries, model.hidden_size, has_gradient)
        has_gradient |= _holds(trained, f"{name}.self_attn.", f"{name}.post_attention_layernorm.")
        mlp = _mlp(model, trained, f"{name}.mlp", layer, has_gradient)
        if layer == model.num_hidden_layers - 1 and not model.has_experts(layer):
            label += mlp
        else:
            token += mlp
        has_gradient |= _holds(trained, f"{name}.mlp.")
    has_gradient |= "model.norm.weight" in trained
    head = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
    label += model.hidden_size * model.vocab_size * (1 + has_gradient + (head in trained))
    return TrainingFlops(2 * token, 2 * label, 2 * pair, model.sliding_window)


def _projections(model: ModelConfig, name: str) -> Iterator[tuple[str, int, int]]:
    """(name, in, out) of attention's three input projections."""
    yield f"{name}.q_proj", model.hidden_size, model.num_attention_heads * model.head_dim
    for part in ("k_proj", "v_proj"):
        yield f"{name}.{part}", model.hidden_size, model.num_key_value_heads * model.head_dim


def _mlp(model: ModelConfig, trained: Collection[str], name: str, layer: int, has_gradient: bool) -> int:
    """Products per token of a layer's MLP, or of its router and the experts that a token goes to."""
    hidden = model.hidden_size
    if model.moe is None or not model.has_experts(layer):
        inner = model.intermediate_size
        wide = sum(_linear(model, trained, f"{name}.{part}_proj", hidden, inner, has_gradient) for part in ("gate", "up"))
        has_gradient |= _holds(trained, f"{name}.gate_proj.", f"{name}.up_proj.")
        return wide + _linear(model, trained, f"{name}.down_proj", inner, hidden, has_gradient)
    inner, each = model.moe.moe_intermediate_size, model.moe.num_experts_per_tok
    is_wide_trained = f"{name}.experts.gate_up_proj" in trained
    router = hidden * model.moe.num_experts * (1 + has_gradient + (f"{name}.gate.weight" in trained))
    wide = 2 * hidden * inner * each * (1 + has_gradient + is_wide_trained)
    return router + wide + hidden * inner * each * (1 + (has_gradient or is_wide_trained) + (f"{name}.experts.down_proj" in trained))


def _linear(model: ModelConfig, trained: Collection[str], name: str, inner: int, outer: int, has_gradient: bool) -> int:
    """Products per token of a linear layer and its adapter. has_gradient: whether its input has one."""
    products = inner * outer * (1 + has_gradient + (f"{name}.weight" in trained))
    if model.adapter is None or not any(target == ALL or fits(name, target) for target in target_names(model.lora)):
        return products
    is_a_trained, is_b_trained = name + LORA_A in trained, name + LORA_B in trained
    narrow = inner * (1 + has_gradient + is_a_trained) + outer * (1 + (has_gradient or is_a_trained) + is_b_trained)
    return products + model.lora.rank * narrow


def _holds(trained: Collection[str], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in trained)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, within a document."""
    unseen = max(0, length - window) if window else 0
    return length * (length + 1) // 2 - unseen * (unseen + 1) // 2
