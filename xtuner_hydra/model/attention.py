"""Attention over packed documents: every token sees itself and what precedes it in its own document (with a sliding window, the last tokens
of it), nothing else.

Like the experts' products and the loss's slices, it depends on the kind of device. CUDA in half precision: one variable-length
flash-attention call. Otherwise, SDPA once per document (on a CPU its flash kernel): the work is the sum of squared document lengths, not the
square of the pack's length, and no mask is made. A document longer than the window is processed in blocks of queries, so that the work grows
with its length, not its square."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, causal within each document.

    q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim), where kv_heads divides heads; all of the same dtype.
    cu_seqlens: (documents + 1,) int32, 0, then the end of each document, the last one `tokens`; max_seqlen: length of the longest.
    window: tokens that a token sees, itself among them; None: no limit. Returns (tokens, heads, head_dim)."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        behind = -1 if window is None else window - 1
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(behind, 0), enable_gqa=True)
        assert isinstance(out, Tensor)
        return out
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    # split, not slices: its backward pass is one concatenation, a slice's is a full tensor of zeros for each document
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    outs = [_causal(*document) if window is None or len(document[0]) <= window else _windowed(*document, window) for document in documents]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class Cache:
    """Keys and values of the tokens of one document that one layer has seen, at most `capacity`. No gradient passes through it."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None = None) -> Tensor:
        """`attention` of the document's first tokens, all at once, or of the next one, which also sees those in the cache."""
        if self.length == 0:
            self._append(k, v)
            return attention(q, k, v, cu_seqlens, max_seqlen, window)
        assert len(q) == 1, "tokens come one by one after the first call"
        self._append(k, v)
        seen = slice(0 if window is None else max(0, self.length - window), self.length)
        return _sdpa(q, self.keys[seen], self.values[seen])

    def _append(self, k: Tensor, v: Tensor) -> None:
        if self.length == 0:
            self.keys, self.values = (x.new_empty(self.capacity, *x.shape[1:]) for x in (k, v))
        new = slice(self.length, self.length + len(k))
        self.keys[new], self.values[new] = k, v
        self.length = new.stop


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One document: (tokens, heads, head_dim) like the arguments; SDPA wants (batch, heads, tokens, head_dim)."""
    return _sdpa(q, k, v, is_causal=True)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One document longer than the window: `window` queries at a time, with the keys that the first to the last of them see."""
    outs = []
    for start in range(0, len(q), window):
        stop, first = min(start + window, len(q)), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        outs.append(_sdpa(q[start:stop], k[first:stop], v[first:stop], attn_mask=(distance >= 0) & (distance < window)))
    return torch.cat(outs)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **visible: Any) -> Tensor:
    if q.is_cuda and q.dtype == torch.float32:  # a GPU's fp32 kernels do not support groups, and SDPA would store all scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **visible).squeeze(0).transpose(0, 1)
