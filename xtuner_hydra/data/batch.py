"""PackedBatch: the documents of one pack as the tensors that the model takes, without padding."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from xtuner_hydra.data.mixture import Samples
from xtuner_hydra.data.packing import Int64s, Packs

IGNORE = -100
"""Label of a token that is not supervised."""
_MOST_PAIRS = 2**17
"""Packs of the heaviest rank times packs of all ranks up to which exchanges are sought, a millisecond each; with more packs they are not needed."""
_MOST_EXCHANGES = 100


@dataclass(frozen=True)
class PackedBatch:
    """One pack of n tokens as T = n - 1 pairs of a token and the one that follows it.

    ids, positions: int64 (T,); positions count from 0 in every document.
    cu_seqlens: int32 (documents + 1,), 0 and the end of each document; max_seqlen: length of the longest.
    rows: int64 (N,), the tokens with a label; targets: int64 (N,), their labels.
    tokens: T, or 0 for the placeholder of a rank without a pack."""

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    targets: Tensor
    tokens: int

    @property
    def labels(self) -> Tensor:
        """int64 (T,), IGNORE for a token without a label: what models of others take."""
        return torch.full_like(self.ids, IGNORE).index_copy(0, self.rows, self.targets)

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`. For a GPU they are copied asynchronously, from pinned memory."""
        tensors = {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}
        if device.type != "cpu":
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def make_batch(cache: Samples, packs: Packs, pack: int) -> PackedBatch:
    """The batch of pack number `pack`, which has at least two tokens."""
    segments = packs.segments(pack)
    documents = list(zip(packs.sample[segments].tolist(), packs.start[segments].tolist(), packs.stop[segments].tolist(), strict=True))
    ids = np.concatenate([cache.ids(sample)[start:stop] for sample, start, stop in documents]).astype(np.int64)
    supervised = np.concatenate([cache.supervised(sample)[start:stop] for sample, start, stop in documents])
    lengths = packs.stop[segments] - packs.start[segments]
    supervised[np.cumsum(lengths) - lengths] = False  # nothing precedes a document's first token
    lengths[-1] -= 1  # the pack's last token is a label only
    return _batch(ids[:-1], np.where(supervised, ids, IGNORE)[1:], lengths[lengths > 0], tokens=len(ids) - 1)


def empty_batch() -> PackedBatch:
    """What a rank without a pack computes on: one token without a label. Its loss and gradients are zero, its collectives those of the others."""
    return _batch(np.zeros(1, dtype=np.int64), np.array([IGNORE]), np.array([1]), tokens=0)


def deal(work: Int64s, ranks: int) -> list[list[int | None]]:
    """Numbers of packs for each rank, as many for each (None: an empty one), so that the ranks' sums of `work` (packs,) are near each other.

    Heaviest first to the rank with the least so far, then exchanges between the heaviest rank and others for as long as they help. A rank
    computes its heaviest pack first: so the packs that ranks compute at the same time are of like size too."""
    share = -(-len(work) // ranks)
    costs = np.concatenate([work, np.zeros(share * ranks - len(work), dtype=np.int64)])  # empty packs last
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for pack in np.argsort(-costs, kind="stable").tolist():
        rank = min((rank for rank in range(ranks) if len(dealt[rank]) < share), key=lambda rank: load[rank])
        dealt[rank].append(pack)
        load[rank] += int(costs[pack])
    if ranks > 1 and 0 < share * share * ranks <= _MOST_PAIRS:
        dealt = [sorted(packs, key=lambda pack: (-costs[pack], pack)) for packs in _exchanged(costs, np.array(dealt)).tolist()]
    return [[pack if pack < len(work) else None for pack in packs] for packs in dealt]


def _exchanged(costs: Int64s, dealt: Int64s) -> Int64s:
    """`dealt` (ranks, share) after exchanges of two packs that each lower the heavier load of two ranks, the heaviest rank being one of them."""
    for _ in range(_MOST_EXCHANGES):
        load = costs[dealt].sum(axis=1)
        heaviest = int(load.argmax())
        moved = costs[dealt[heaviest]][:, None, None] - costs[dealt]  # (share, ranks, share): work that leaves the heaviest rank
        heavier = np.maximum(load[heaviest] - moved, load[:, None] + moved)
        mine, other, theirs = np.unravel_index(heavier.argmin(), heavier.shape)
        if heavier[mine, other, theirs] >= load[heaviest]:
            break
        dealt[heaviest, mine], dealt[other, theirs] = dealt[other, theirs], dealt[heaviest, mine]
    return dealt


def _batch(ids: Int64s, labels: Int64s, lengths: Int64s, tokens: int) -> PackedBatch:
    ends = np.cumsum(lengths)
    rows = np.flatnonzero(labels != IGNORE)
    return PackedBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(np.arange(len(ids)) - np.repeat(ends - lengths, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(labels[rows]),
        tokens=tokens,
    )
