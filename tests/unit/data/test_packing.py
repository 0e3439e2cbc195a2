import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner_hydra.data.packing import best_fit, hard, length_grouped_order, none, soft

CAPACITY = 50
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60).map(lambda lengths: np.array(lengths, dtype=np.int64))
LONG = st.lists(st.integers(1, 3 * CAPACITY), min_size=1, max_size=60).map(lambda lengths: np.array(lengths, dtype=np.int64))


def segments(packs):
    return [list(zip(packs.sample[s], packs.start[s], packs.stop[s], strict=True)) for s in map(packs.segments, range(len(packs)))]


def assert_every_token_once(packs, lengths):
    pieces = sorted(piece for pack in segments(packs) for piece in pack)
    covered = {sample: 0 for sample in range(len(lengths))}
    for sample, start, stop in pieces:
        assert start == covered[sample] < stop
        covered[sample] = stop
    assert list(covered.values()) == lengths.tolist()


@given(LENGTHS, st.one_of(st.none(), st.integers(0, 99)))
def test_whole_samples_fit_and_come_once(lengths, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    for packs in (best_fit(lengths, CAPACITY, rng), soft(lengths, CAPACITY, seed), none(lengths, rng)):
        assert_every_token_once(packs, lengths)
        assert packs.lengths.max() <= CAPACITY
        assert len(packs.sample) == len(lengths)


@given(LONG, st.one_of(st.none(), st.integers(0, 99)))
def test_hard_cuts_one_stream_into_full_packs(lengths, seed):
    packs = hard(lengths, CAPACITY, None if seed is None else np.random.default_rng(seed))
    assert_every_token_once(packs, lengths)
    assert packs.lengths[:-1].tolist() == [CAPACITY] * (len(packs) - 1)
    stream = [(sample, token) for pack in segments(packs) for sample, start, stop in pack for token in range(start, stop)]
    order = list(dict.fromkeys(sample for sample, _ in stream))
    assert stream == [(sample, token) for sample in order for token in range(lengths[sample])]


@given(LENGTHS, st.one_of(st.none(), st.integers(0, 99)))
def test_soft_is_next_fit_over_the_shuffled_samples(lengths, seed):
    order = list(range(len(lengths)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    packs = [[]]
    for sample in order:
        if sum(lengths[i] for i in packs[-1]) + lengths[sample] > CAPACITY:
            packs.append([])
        packs[-1].append(sample)
    assert [[sample for sample, _, _ in pack] for pack in segments(soft(lengths, CAPACITY, seed))] == packs


@given(LENGTHS)
def test_best_fit_without_a_generator_is_best_fit_decreasing(lengths):
    rooms, packs = [], []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [i for i in range(len(packs)) if rooms[i] >= lengths[sample]]
        if not fitting:
            rooms.append(CAPACITY)
            packs.append([])
            fitting = [len(packs) - 1]
        best = min(fitting, key=lambda i: rooms[i])
        rooms[best] -= lengths[sample]
        packs[best].append(sample)
    ours = best_fit(lengths, CAPACITY, None)
    assert sorted(ours.lengths) == sorted(CAPACITY - room for room in rooms)
    firsts = [pack[0][0] for pack in segments(ours)]
    assert firsts == sorted(firsts)


@given(LENGTHS, st.integers(0, 99))
def test_the_same_seed_gives_the_same_packs(lengths, seed):
    def packed():
        for method, source in ((best_fit, np.random.default_rng(seed)), (hard, np.random.default_rng(seed)), (soft, seed)):
            yield segments(method(lengths, CAPACITY, source))
        yield segments(none(lengths, np.random.default_rng(seed)))

    assert list(packed()) == list(packed())


@given(LENGTHS, st.data())
def test_take_chooses_and_orders_whole_packs(lengths, data):
    packs = hard(lengths, 7, None)
    order = data.draw(st.lists(st.integers(0, len(packs) - 1)))
    assert segments(packs.take(np.array(order, dtype=np.int64))) == [segments(packs)[pack] for pack in order]


def test_best_fit_is_nearly_full_on_lengths_as_chats_have_them_and_differs_from_epoch_to_epoch():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000).astype(np.int64), 1, 4096)
    first, second = (best_fit(lengths, 4096, np.random.default_rng([42, epoch])) for epoch in (0, 1))
    assert first.lengths.sum() / (len(first) * 4096) > 0.99
    assert {tuple(pack) for pack in segments(first)} != {tuple(pack) for pack in segments(second)}
    same = best_fit(lengths, 4096, np.random.default_rng([42, 0]))
    np.testing.assert_array_equal(first.sample, same.sample)


@pytest.mark.parametrize("lengths", [[3, 60], [0, 3]])
@pytest.mark.parametrize("method", [best_fit, soft])
def test_a_sample_that_fits_no_pack_is_a_mistake_of_the_caller(method, lengths):
    with pytest.raises(ValueError, match=f"from {lengths[0]} to {lengths[1]} "):
        method(np.array(lengths), CAPACITY, None)


@given(LENGTHS, st.integers(1, 5))
def test_xtuners_order_holds_every_pack_once(lengths, batch):
    packs = soft(lengths, CAPACITY, 1)
    assert sorted(length_grouped_order(packs, batch, 42)) == list(range(len(packs)))
