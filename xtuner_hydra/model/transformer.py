"""The decoder: embedding, layers, final norm, head. Its modules have Hugging Face's names (except experts: families/qwen3_moe.py).

Knows nothing of devices, sharding or files. New parameters hold no useful values: `initialise` or `load_pretrained` fills them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.loss import linear_cross_entropy
from xtuner_hydra.model.attention import Cache
from xtuner_hydra.model.experts import MoE, Routing
from xtuner_hydra.model.layers import MLP, Attention, Embedding, RMSNorm, rotary


class CausalLM(nn.Module):
    """A causal language model over packed tokens.

    May be built on the meta device and given memory later with `to_empty`; a tied head stays tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config)
        self._tie()

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        with_routing: bool = False,
        caches: Sequence[Cache] | None = None,
    ) -> Any:
        """Logits of every token (or of `rows`), (T, vocab) fp32; or, given `targets` too, the scalar fp32 sum of -log p(target) over them.
        `with_routing`: (that, Routing of the layers that have experts, None where none has).

        ids, positions: (T,) int64, T at least 1; positions count from 0 in every document. cu_seqlens: (documents + 1,) int32;
        max_seqlen: length of the longest document. rows: (N,) int64, the tokens with a label; targets: (N,) int64, their labels.
        caches: one per layer, for generation (model/generation.py): the tokens are those of one document that follow the cached ones.
        With N = 0 the loss is 0 and every gradient zero, not missing: under FSDP all ranks must run the same collectives."""
        hidden, routing = self.model(ids, positions, cu_seqlens, max_seqlen, rows, caches)
        result = self.lm_head(hidden, targets)
        return (result, routing) if with_routing else result

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # `to_empty` replaces parameters module by module, which would give a tied head its own weight
        super()._apply(fn, recurse)
        self._tie()
        return self


class Decoder(nn.Module):
    """Everything before the head: ids (T,) -> (normed hidden states, (T, hidden), or of `rows` only; the layers' Routing or None)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> tuple[Tensor, Routing | None]:
        hidden = self.embed_tokens(ids)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, hidden.dtype, self.config.rope_scaling)
        routings = []
        for number, layer in enumerate(self.layers):
            wanted = rows if layer is self.layers[-1] else None
            hidden, routing = layer(hidden, cos, sin, cu_seqlens, max_seqlen, wanted, caches[number] if caches else None)
            if routing is not None:
                routings.append(routing)
        return self.norm(hidden), Routing(*map(torch.stack, zip(*routings, strict=True))) if routings else None


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP or experts, each added to the residual stream: x (T, hidden) -> (the same, or only `rows` (N,) of it, an MLP being
    computed for these only; Routing of experts, which are computed for all tokens, or None)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MoE(config.hidden_size, config.moe) if config.moe and config.has_experts(layer) else MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, max_seqlen, cache)
        if isinstance(self.mlp, MoE):
            # returned, not kept in the module, so that recomputation and FSDP's hooks see it
            out, routing = self.mlp(self.post_attention_layernorm(x))
            return _select(x + out, rows), routing
        x = _select(x, rows)
        return x + self.mlp(self.post_attention_layernorm(x)), None


def _select(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


class Head(nn.Linear):
    """hidden (N, hidden) -> logits (N, vocab) fp32, or with targets (N,) the summed loss (here, so that FSDP gathers the weight)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(hidden).float()
        return linear_cross_entropy(hidden, self.weight, targets)
