"""The parts of the decoder: embedding, RMSNorm, rotary positions, grouped-query attention, SwiGLU. No batch dimension: T tokens are packed.

Norm, rotation and SwiGLU have hand-written backward passes: they keep only their inputs, whereas autograd would keep an intermediate of each
operation, several of them in fp32. The embedding has one that sums in fp32."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xtuner_hydra.config.schema import ModelConfig, RopeScaling
from xtuner_hydra.model.attention import Cache, attention
from xtuner_hydra.pointwise import pointwise


class Embedding(nn.Embedding):
    """ids (T,) int64 -> (T, hidden). A token's gradients are summed in fp32, then rounded once to the weight's dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        return _Embedding.apply(self.weight, ids)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape  # nothing else of the weight is needed: sharding.py frees it
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        ordered, order = ids.sort(stable=True)
        # equal ids share a row of a small fp32 table; no shape depends on values, so that the host need not wait for a GPU
        table_row = torch.cat([ordered.new_zeros(1), (ordered.diff() != 0).long()]).cumsum(0)
        table = torch.ops.aten.embedding_dense_backward(grad[order].float(), table_row, len(ids), -1, False)
        grad_weight = grad.new_zeros(ctx.shape)
        grad_weight[ordered] = table[table_row].to(grad.dtype)
        return grad_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 (Zhang & Sennrich 2019; rounding as in Hugging Face's)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_x, grad_weight = _norm_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return grad_x, grad_weight, None


@pointwise
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x normed, and 1 / rms(x) (..., 1) fp32."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(eps))
    return (x32 * scale).to(x.dtype) * weight, scale


@pointwise
def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, for_weight: bool) -> tuple[Tensor, Tensor | None]:
    grad = grad.float()
    normed = x.float() * scale
    grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if for_weight else None
    grad = grad * weight
    grad_x = (grad - normed * (grad * normed).mean(-1, keepdim=True)).mul_(scale)
    return grad_x.to(x.dtype), grad_weight


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's angles (Su et al. 2021), (T, 1, head_dim / 2) in `dtype`.

    positions: (T,) int64. Computed from the config every time: a model built on the meta device has nothing to lose."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None, None] * _stretched(1.0 / theta**exponents, scaling)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _stretched(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """`linear`: every frequency divided by the factor. `llama3`: those that turn less than low_freq_factor times in the original context are;
    those above high_freq_factor stay; in between, an interpolation linear in the number of turns (Llama 3.1's model code)."""
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert context is not None
    assert low is not None
    assert high is not None
    turns = context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class _Rotate(torch.autograd.Function):
    """Turn each pair (x[i], x[i + head_dim / 2]) by its angle; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


@pointwise
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    out_first.copy_(first).mul_(cos).addcmul_(second, sin, value=-1)
    out_second.copy_(second).mul_(cos).addcmul_(first, sin)
    return out


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and RMSNorm on every head's queries and keys if the config has `qk_norm`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        hidden, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        query_size, key_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, query_size, bias=bias)
        self.k_proj = nn.Linear(hidden, key_size, bias=bias)
        self.v_proj = nn.Linear(hidden, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, hidden, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: Cache | None = None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = _Rotate.apply(self.q_norm(q), cos, sin)
        k = _Rotate.apply(self.k_norm(k), cos, sin)
        attend = attention if cache is None else cache.attention
        return self.o_proj(attend(q, k, v, cu_seqlens, max_seqlen, self.window).flatten(1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if type(self.down_proj) is nn.Linear:
            return _SwiGLUDown.apply(gate, up, self.down_proj.weight)
        return self.down_proj(swiglu(gate, up))  # with an adapter


class _SwiGLUDown(torch.autograd.Function):
    """down(silu(gate) * up), the product recomputed in the backward pass: a third less to keep of a model's widest tensors."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return _swiglu(gate, up) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        grad_weight = grad.T @ (activated * up) if ctx.needs_input_grad[2] else None
        return *_swiglu_backward(grad @ weight, gate, up, activated), grad_weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _swiglu_backward(grad, gate, up, F.silu(gate))


@pointwise
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


@pointwise
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gate` and `up`; overwrites `activated`, which is silu(gate)."""
    return torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad)
