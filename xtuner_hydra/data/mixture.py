"""Several token caches as one (data.sources), and the part of one that is held out (data.eval_ratio)."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.data.cache import TokenCache
from xtuner_hydra.errors import ConfigError


class Mixture:
    """The samples of the first cache, then those of the next, with the attributes and methods of a TokenCache."""

    def __init__(self, parts: list[TokenCache]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.supervised_lengths = np.concatenate([part.supervised_lengths for part in parts])
        self.files = [file for part in parts for file in part.files]
        self.sample_counts = [count for part in parts for count in part.sample_counts]
        self.skipped = [line for part in parts for line in part.skipped]
        self.file_hashes = [digest for part in parts for digest in part.file_hashes]
        self.file_stamps = [stamp for part in parts for stamp in part.file_stamps]
        self.largest_id = max(part.largest_id for part in parts)
        self.fingerprint = hashlib.sha256(json.dumps([part.fingerprint for part in parts]).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, sample: int) -> NDArray[np.unsignedinteger]:
        """Token ids of a sample, (tokens,), read-only."""
        part, number = self._find(sample)
        return part.ids(number)

    def supervised(self, sample: int) -> NDArray[np.bool_]:
        """Which tokens of a sample are labels, (tokens,), read-only."""
        part, number = self._find(sample)
        return part.supervised(number)

    def locate(self, sample: int) -> tuple[Path, int]:
        """(file, line number) that a sample was read from."""
        part, number = self._find(sample)
        return part.locate(number)

    def _find(self, sample: int) -> tuple[TokenCache, int]:
        part = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.parts[part], sample - int(self.starts[part])


Samples = TokenCache | Mixture


def parts_of(cache: Samples) -> list[tuple[TokenCache, slice]]:
    """The caches in `cache`, each with the numbers of its samples there."""
    if isinstance(cache, TokenCache):
        return [(cache, slice(0, len(cache)))]
    return [(part, slice(int(start), int(stop))) for part, (start, stop) in zip(cache.parts, pairwise(cache.starts), strict=True)]


def held_out(cache: Samples, ratio: float) -> NDArray[np.bool_]:
    """Which samples are held out, (samples,): about `ratio` of them, at least one, chosen by a hash of their tokens and by nothing else.

    So equal samples are on the same side, and the choice is the same for any seed, order and packing."""
    marks = np.array([_mark(cache.ids(sample)) for sample in range(len(cache))], dtype=np.uint64)
    count = max(1, round(ratio * len(marks)))
    held = marks <= np.sort(marks)[count - 1]
    if held.all():
        raise ConfigError("data.eval_ratio", ratio, f"holds out all of the {len(cache)} samples; nothing is left to train on")
    return held


def _mark(ids: NDArray[np.unsignedinteger]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.astype(np.uint32).tobytes(), digest_size=8).digest(), "little")
