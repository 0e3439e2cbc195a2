"""Packing: from sample lengths to packs of at most `capacity` tokens. Pure functions of their arguments.

best_fit   longest first, each sample into the fullest pack that still has room (best-fit decreasing): 99.9 % full on log-normal
           lengths, about a second for a million samples. A random generator jitters the order, so that packs differ from epoch to epoch.
soft       XTuner's: shuffle, then next-fit; a sample that does not fit closes the pack. Samples stay whole.
hard       one stream of shuffled samples, cut every `capacity` tokens.
none       a pack a sample."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

_JITTER = 0.1  # share of its length by which a sample's place in the order may move; costs less than 0.01 % of utilisation


@dataclass(frozen=True)
class Packs:
    """Packs of segments; segment s is tokens [start[s], stop[s]) of sample[s], pack p is segments [offsets[p], offsets[p + 1]).

    sample, start, stop: int64 (segments,); offsets: int64 (packs + 1,). No pack and no segment is empty."""

    sample: Int64s
    start: Int64s
    stop: Int64s
    offsets: Int64s

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64s:
        """Tokens of each pack, (packs,)."""
        return self.sum(self.stop - self.start)

    def sum(self, values: Int64s) -> Int64s:
        """A value of each segment -> its sum over each pack, (packs,)."""
        return np.add.reduceat(values, self.offsets[:-1]) if len(self) else np.zeros(0, dtype=np.int64)

    def segments(self, pack: int) -> slice:
        """Where pack `pack` stands in sample, start, stop."""
        return slice(int(self.offsets[pack]), int(self.offsets[pack + 1]))

    def take(self, order: Int64s) -> Packs:
        """The packs numbered `order`, in that order."""
        counts = np.diff(self.offsets)[order]
        offsets = _offsets(counts)
        segments = np.repeat(self.offsets[:-1][order] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Packs(self.sample[segments], self.start[segments], self.stop[segments], offsets)


def best_fit(lengths: Int64s, capacity: int, rng: np.random.Generator | None) -> Packs:
    """Fullest packs of whole samples, in random order. Without `rng`: always the same ones, in the order of their first sample.

    Every length must be from 1 to `capacity`."""
    _check(lengths, capacity)
    size = lengths if rng is None else lengths * (1 - _JITTER * rng.random(len(lengths)))
    order = np.argsort(-size, kind="stable")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[order] = _best_fit(lengths[order].tolist(), capacity)
    by_pack = np.argsort(pack_of, kind="stable")
    packs = _whole(by_pack, lengths, _offsets(np.bincount(pack_of)))
    if rng is None:
        return packs.take(np.argsort(packs.sample[packs.offsets[:-1]]))
    return packs.take(rng.permutation(len(packs)))


def soft(lengths: Int64s, capacity: int, seed: int | None) -> Packs:
    """XTuner's packs: samples shuffled by `random.Random(seed)` (None: file order), each put into the pack at hand or else into a new one.

    Every length must be from 1 to `capacity`."""
    _check(lengths, capacity)
    order = list(range(len(lengths)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    samples = np.array(order, dtype=np.int64)
    ends = np.cumsum(lengths[samples])
    offsets = [0]
    while offsets[-1] < len(samples):
        filled = ends[offsets[-1] - 1] if offsets[-1] else 0
        offsets.append(int(np.searchsorted(ends, filled + capacity, side="right")))
    return _whole(samples, lengths, np.array(offsets, dtype=np.int64))


def hard(lengths: Int64s, capacity: int, rng: np.random.Generator | None) -> Packs:
    """One stream of the (shuffled) samples, cut every `capacity` tokens; only the last pack is shorter. Samples may be of any length."""
    samples = _order(len(lengths), rng)
    ends = np.cumsum(lengths[samples])
    cuts = np.arange(capacity, ends[-1], capacity)
    edges = np.union1d(ends, cuts)  # a segment ends where a sample or a pack does
    begins = np.concatenate([[0], edges[:-1]])
    place = np.searchsorted(ends, begins, side="right")  # whose sample a segment is
    shift = begins - (ends - lengths[samples])[place]
    offsets = np.searchsorted(begins, np.arange(0, ends[-1], capacity))
    return Packs(samples[place], shift, shift + edges - begins, np.append(offsets, len(begins)))


def none(lengths: Int64s, rng: np.random.Generator | None) -> Packs:
    """A pack a sample, shuffled by `rng`."""
    return _whole(_order(len(lengths), rng), lengths, np.arange(len(lengths) + 1))


def length_grouped_order(packs: Packs, global_batch_size: int, seed: int) -> Int64s:
    """XTuner's order of packs for its group size of 1: int64 (packs,). It is random; that ranks get like work is seen to by batch.deal.

    A random permutation is cut into mega-batches of k * global_batch_size packs, k = min(packs // (4 * global_batch_size), 50) or 1. Each is
    sorted by its packs' longest sample, descending, and shuffled."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(packs), generator=generator).tolist()
    longest = np.maximum.reduceat(packs.stop - packs.start, packs.offsets[:-1]).tolist()
    mega = max(1, min(len(packs) // (4 * global_batch_size), 50)) * global_batch_size
    shuffle = random.Random(seed).shuffle
    result: list[int] = []
    for begin in range(0, len(order), mega):
        batch = sorted(order[begin : begin + mega], key=lambda pack: -longest[pack])
        shuffle(batch)
        result += batch
    return np.array(result, dtype=np.int64)


def _best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The pack of each sample, samples taken in the order given."""
    packs_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room they have left
    rooms: list[int] = []  # rooms that some pack has, ascending
    result: list[int] = []
    count = 0
    for length in lengths:
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del rooms[place]
        else:
            room, pack = capacity, count
            count += 1
        result.append(pack)
        if room := room - length:
            if not packs_with[room]:
                insort(rooms, room)
            packs_with[room].append(pack)
    return result


def _check(lengths: Int64s, capacity: int) -> None:
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit packs of 1 to {capacity} tokens")


def _order(count: int, rng: np.random.Generator | None) -> Int64s:
    return np.arange(count) if rng is None else rng.permutation(count)


def _whole(samples: Int64s, lengths: Int64s, offsets: Int64s) -> Packs:
    return Packs(samples, np.zeros(len(samples), dtype=np.int64), lengths[samples], offsets)


def _offsets(counts: Int64s) -> Int64s:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
