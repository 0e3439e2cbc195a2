"""Attention over packed documents: every token sees itself and what precedes it in its own document, nothing else.

The one place in `model/` that names a kind of device. CUDA in half precision: one variable-length flash-attention call. Elsewhere, SDPA's
flash kernel once a document: the work is the sum of squared document lengths, not the square of the pack's length, and no mask is made."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, causal within each document.

    q: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim), where kv_heads divides heads; all of one dtype.
    cu_seqlens: (documents + 1,) int32, 0, then the end of each document, the last one `tokens`; max_seqlen: length of the longest.
    Returns (tokens, heads, head_dim)."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, Tensor)
        return out
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    # split, not slices: its backward pass is one concatenation, a slice's is a full tensor of zeros for each document
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    outs = [_causal(*document) for document in documents]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One document: (tokens, heads, head_dim) like the arguments; SDPA wants (batch, heads, tokens, head_dim)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1)
