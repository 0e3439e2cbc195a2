"""The plan of a run's data, made before step 1: which samples, in which packs, in which steps.

The order is a pure function of (data, seed, epoch) and knows nothing of ranks. An epoch's packs are cut into steps of `global_batch_size`;
a step does not cross the end of an epoch, so an epoch's last step may be short. The place in the data is one number, the step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.config.schema import DataConfig, ModelConfig, TrainerConfig
from xtuner_hydra.data import packing
from xtuner_hydra.data.mixture import Samples
from xtuner_hydra.data.packing import Int64s, Packs
from xtuner_hydra.data.readers import unit
from xtuner_hydra.errors import DataError

_TOKEN_WORK = 16384  # a token's matrix products cost about as much as attending to so many others (10,000 in qwen3_tiny, 50,000 in 8B)

EVAL_PACK = 2048
"""Tokens in a pack of held-out data, unless a sample is longer; without gradients it needs little memory."""

COUNTED = 2_000_000
"""Samples, over all epochs, that are packed at most only to count tokens: some seconds."""

MOST = 10**9
"""Samples of an epoch, at most: 8 GB of numbers."""

EXAMPLES = 3
"""Samples of each kind of loss that are told by name."""


@dataclass(frozen=True)
class Selection:
    """What of a cache is used, as parallel arrays: tokens [0, lengths[i]) of samples[i]. samples, lengths: int64 (selected,).

    The counts say what became of the rest: `truncated` to max_length, `dropped` as longer, `unsupervised` = without a label (any more).
    examples: the first few samples of each of these, by its name."""

    samples: Int64s
    lengths: Int64s
    truncated: int = 0
    dropped: int = 0
    unsupervised: int = 0
    examples: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokens(self) -> int:
        """Tokens of all selected samples."""
        return int(self.lengths.sum())


def training_limit(data: DataConfig) -> int | None:
    """Tokens of the longest training sample; None: no limit."""
    if data.max_length is not None:
        return data.max_length
    return None if data.pack_strategy == "hard" else data.pack_max_length


def held_out_limit(data: DataConfig, model: ModelConfig) -> int | None:
    """Tokens of the longest held-out sample. The packing has no say, so that runs which pack differently are judged on the same tokens."""
    if data.max_length is not None:
        return data.max_length
    return None if data.pack_strategy == "hard" else model.max_position_embeddings


def select_samples(
    cache: Samples,
    data: DataConfig,
    limit: int | None,
    *,
    seed: int,
    sample_ratio: float,
    key: str,
    among: NDArray[np.bool_] | None = None,
) -> Selection:
    """Apply sample_ratio, `limit` and overlong. `key` (data.path, data.eval_path) starts the messages; among: which samples there are.

    Raises DataError for an overlong sample where that is an error, and where no sample with a label is left."""
    there = np.arange(len(cache)) if among is None else np.flatnonzero(among)
    samples = there[_repeat(len(there), sample_ratio, seed, key)]
    lengths = cache.lengths[samples]
    overlong = lengths > limit if limit is not None else np.zeros(len(samples), dtype=bool)
    if data.overlong == "error" and overlong.any():
        raise _overlong(cache, data, int(samples[overlong.argmax()]), limit, key)
    keep = ~overlong if data.overlong == "drop" else np.ones(len(samples), dtype=bool)
    stops = lengths if limit is None else np.minimum(lengths, limit)
    learnt = supervised_tokens(cache, samples, np.zeros_like(stops), stops) > 0
    used = keep & learnt
    if not used.any():
        if not len(there):
            raise DataError(
                f"{key}: {', '.join(map(str, cache.files))}: data.eval_ratio holds out every sample of this source; lower it, or hold out a file"
            )
        raise _nothing_left(cache, len(there), keep, key)
    lost = {"truncated": overlong & used, "dropped": ~keep, "unsupervised": keep & ~learnt}
    counts = {name: int(which.sum()) for name, which in lost.items()}
    examples = {name: samples[which][:EXAMPLES].tolist() for name, which in lost.items()}
    return Selection(samples[used], stops[used], **counts, examples=examples)


def join(selections: list[Selection], starts: list[int]) -> Selection:
    """Selections of the parts of a mixture as one of the whole; starts: number of each part's first sample."""
    return Selection(
        np.concatenate([selection.samples + start for selection, start in zip(selections, starts, strict=True)]),
        np.concatenate([selection.lengths for selection in selections]),
        truncated=sum(selection.truncated for selection in selections),
        dropped=sum(selection.dropped for selection in selections),
        unsupervised=sum(selection.unsupervised for selection in selections),
        examples={
            name: [sample + start for selection, start in zip(selections, starts, strict=True) for sample in selection.examples[name]][
                :EXAMPLES
            ]
            for name in ("truncated", "dropped", "unsupervised")
        },
    )


def supervised_tokens(cache: Samples, samples: Int64s, start: Int64s, stop: Int64s) -> Int64s:
    """Labels in tokens [start, stop) of each sample, (samples,). The first token of a segment has none: what precedes it is elsewhere."""
    counts = cache.supervised_lengths[samples]
    for i in np.flatnonzero((start > 0) | (stop < cache.lengths[samples])):
        counts[i] = np.count_nonzero(cache.supervised(int(samples[i]))[start[i] + 1 : stop[i]])
    return counts


@dataclass(frozen=True)
class Epoch:
    """The packs of one epoch in the order of training; a pack's sample numbers are the cache's.

    tokens, supervised_tokens, work: int64 (packs,), of what the model is fed: a pack of n tokens makes n - 1 predictions."""

    packs: Packs
    supervised_tokens: Int64s

    @cached_property
    def tokens(self) -> Int64s:
        return self.packs.lengths - 1

    @cached_property
    def work(self) -> Int64s:
        return work(self.packs)


class TrainPlan:
    """All steps of a run. Epochs are packed when they are asked for; the last two are kept.

    total_steps: int, exact."""

    def __init__(self, cache: Samples, selection: Selection, data: DataConfig, trainer: TrainerConfig) -> None:
        assert trainer.global_batch_size is not None, "resolved before the data is planned"
        self.cache = cache
        self.selection = selection
        self.data = data
        self.batch_size = trainer.global_batch_size
        self.seed = trainer.seed
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self._starts = [0]  # first step of each epoch that is known, and of the one after
        self.total_steps = self._count_steps(trainer)

    def _epoch(self, number: int) -> Epoch:
        """Pack epoch `number` (from 0). Packs without a label, which only `hard` can make, are left out."""
        packs = _pack(self.selection.lengths, self.data, self.batch_size, self.seed, number)
        packs = Packs(self.selection.samples[packs.sample], packs.start, packs.stop, packs.offsets)
        supervised = packs.sum(supervised_tokens(self.cache, packs.sample, packs.start, packs.stop))
        useful = np.flatnonzero(supervised)
        if not len(useful):
            raise DataError(
                f"data.path: no pack of epoch {number} holds a supervised token: data.pack_strategy=hard cuts every {self.data.pack_max_length} "
                "tokens, before the only ones there are. Raise data.pack_max_length, or choose another pack_strategy"
            )
        return Epoch(packs, supervised) if len(useful) == len(packs) else Epoch(packs.take(useful), supervised[useful])

    def epoch_packs(self, number: int) -> Packs:
        """The packs of an epoch in the order of training."""
        return self.epoch(number).packs

    def locate(self, step: int) -> tuple[int, range]:
        """(epoch, numbers of its packs) of 0-based `step`."""
        epoch = self._epoch_of(step)
        first = (step - self._starts[epoch]) * self.batch_size
        return epoch, range(first, min(first + self.batch_size, len(self.epoch(epoch).packs)))

    def _epoch_of(self, step: int) -> int:
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self._steps_in(len(self._starts) - 1))
        return bisect_right(self._starts, step) - 1

    def epochs_after(self, step: int) -> float:
        """Epochs done after `step` steps: 1.5 is in the middle of the second."""
        if step == 0:
            return 0.0
        epoch = self._epoch_of(step - 1)
        start, stop = self._starts[epoch : epoch + 2]
        return epoch + (step - start) / (stop - start)

    @property
    def is_countable(self) -> bool:
        """Whether total_tokens is exact."""
        epochs = -(-self.total_steps // self._steps_in(0))
        return epochs * (len(self.selection.samples) + 500) <= COUNTED  # an epoch costs as much as 500 samples however few it has

    @cached_property
    def total_tokens(self) -> int:
        """Tokens of all steps; approximate for very many epochs, where counting them would take minutes."""
        if not self.is_countable:
            return self.expected_tokens
        total = done = epoch = 0
        while done < self.total_steps:
            steps = min(self._steps_in(epoch), self.total_steps - done)
            total += int(self.epoch(epoch).tokens[: steps * self.batch_size].sum())
            done += steps
            epoch += 1
        return total

    @property
    def expected_tokens(self) -> int:
        """Tokens of all steps, if all epochs are like the first: the others need not be packed to know it."""
        return int(self.total_steps / self._steps_in(0) * self.epoch(0).tokens.sum())

    @property
    def utilization(self) -> float:
        """Share of the first epoch's packs that holds tokens."""
        lengths = self.epoch(0).packs.lengths
        return float(lengths.sum() / (len(lengths) * self.data.pack_max_length))

    def _count_steps(self, trainer: TrainerConfig) -> int:
        if trainer.total_steps is not None:
            return trainer.total_steps
        if trainer.total_tokens is not None:
            return self._steps_for_tokens(trainer.total_tokens)
        return sum(self._steps_in(epoch) for epoch in range(trainer.epochs or 1))

    def _steps_for_tokens(self, tokens: int) -> int:
        """Steps until `tokens` have been seen."""
        steps = epoch = 0
        while True:
            of_packs = self.epoch(epoch).tokens
            of_steps = np.add.reduceat(of_packs, range(0, len(of_packs), self.batch_size))
            seen = np.cumsum(of_steps)
            if seen[-1] >= tokens:
                return steps + int(np.searchsorted(seen, tokens)) + 1
            tokens -= int(seen[-1])
            steps += len(seen)
            epoch += 1

    def _steps_in(self, epoch: int) -> int:
        return -(-len(self.epoch(epoch).packs) // self.batch_size)


def eval_packs(selection: Selection, data: DataConfig, longest: int) -> Packs:
    """Held-out samples in few packs, in their order, the same ones whatever the training's packing; sample numbers are the cache's.

    longest: tokens of the longest sequence that the model knows (max_position_embeddings), for samples that are longer than any pack."""
    if data.pack_strategy == "hard":
        packs = packing.hard(selection.lengths, min(EVAL_PACK, longest), None)
        packs = packs.take(np.flatnonzero(packs.lengths > 1))
    else:
        packs = packing.best_fit(selection.lengths, max(EVAL_PACK, int(selection.lengths.max())), None)
    return Packs(selection.samples[packs.sample], packs.start, packs.stop, packs.offsets)


def work(packs: Packs) -> Int64s:
    """What each pack costs to compute, (packs,), in units of attending to one token."""
    lengths = packs.stop - packs.start
    return packs.sum(lengths * lengths + _TOKEN_WORK * lengths)


def _pack(lengths: Int64s, data: DataConfig, batch_size: int, seed: int, epoch: int) -> Packs:
    rng = np.random.default_rng([seed, epoch]) if data.shuffle else None
    if data.pack_strategy == "best_fit":
        return packing.best_fit(lengths, data.pack_max_length, rng)
    if data.pack_strategy == "hard":
        return packing.hard(lengths, data.pack_max_length, rng)
    if data.pack_strategy == "none":
        return packing.none(lengths, rng)
    # soft is XTuner's in all: epoch 0 is shuffled and ordered by the seed itself
    packs = packing.soft(lengths, data.pack_max_length, seed + epoch if data.shuffle else None)
    return packs.take(packing.length_grouped_order(packs, batch_size, seed + epoch)) if data.shuffle else packs


def _repeat(samples: int, ratio: float, seed: int, key: str) -> Int64s:
    """Sample numbers, the integer part of `ratio` times over, then a fraction of them drawn without replacement."""
    if ratio * samples > MOST:
        raise DataError(
            f"{key}: sample_ratio {ratio:g} makes {ratio * samples:.3g} samples of {samples:,}; {MOST:,} are the most that are planned"
        )
    whole, fraction = int(ratio), ratio - int(ratio)
    drawn = np.random.default_rng([seed, samples]).permutation(samples)[: round(fraction * samples)]
    return np.concatenate([np.tile(np.arange(samples), whole), np.sort(drawn)])


def _overlong(cache: Samples, data: DataConfig, sample: int, limit: int | None, key: str) -> DataError:
    file, line = cache.locate(sample)
    default = "data.pack_max_length" if limit == data.pack_max_length else "model.max_position_embeddings"
    name = default if data.max_length is None else "data.max_length"
    return DataError(
        f"{key}: {file} {unit(file)} {line}: {cache.lengths[sample]} tokens, longer than {name}={limit}.\n"
        "Raise that, or set data.overlong to truncate or drop; both are counted and announced."
    )


def _nothing_left(cache: Samples, there: int, keep: np.ndarray, key: str) -> DataError:
    where = f"{key}: {', '.join(map(str, cache.files))}"
    if not len(keep):
        return DataError(f"{where}: data.sample_ratio leaves none of the {there} samples")
    if not keep.any():
        return DataError(
            f"{where}: every sample is longer than allowed and data.overlong=drop; raise data.pack_max_length or data.max_length"
        )
    return DataError(
        f"{where}: no supervised token in any sample; there is nothing to learn. Look for `loss: false` on the assistant's messages, "
        "and whether data.pack_max_length cuts every sample off before the assistant speaks"
    )
