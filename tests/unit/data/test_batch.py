import numpy as np
import pytest
import torch
from chats import cache_of, chat
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_hydra.data.batch import IGNORE, deal, empty_batch, make_batch
from xtuner_hydra.data.packing import Packs


def pack(*segments):
    sample, start, stop = (np.array(column) for column in zip(*segments, strict=True))
    return Packs(sample, start, stop, np.array([0, len(segments)]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("batch"), [chat("one " * 5), chat("three " * 4), [*chat("two"), *chat("four")]])


@st.composite
def some_segments(draw):
    """Segments of the three samples, which have 40 tokens and more; two tokens at least in all."""
    spans = st.tuples(st.integers(0, 2), st.integers(0, 39), st.integers(1, 40)).filter(lambda span: span[1] < span[2])
    return draw(st.lists(spans, min_size=1, max_size=6).filter(lambda spans: sum(stop - start for _, start, stop in spans) > 1))


@settings(deadline=None)
@given(some_segments())
def test_documents_are_shifted_each_for_itself(cache, segments):
    """Against the obvious way: each document's tokens, their successors, positions from 0."""
    batch = make_batch(cache, pack(*segments), 0)
    ids, labels, positions, lengths = [], [], [], []
    for sample, start, stop in segments:
        tokens, learnt = cache.ids(sample)[start:stop].astype(int).tolist(), cache.supervised(sample)[start:stop].tolist()
        ids += tokens
        labels += [token if is_learnt else IGNORE for token, is_learnt in zip(tokens, learnt, strict=True)][1:]
        labels.append(IGNORE)
        positions += range(len(tokens))
        lengths.append(len(tokens))
    lengths[-1] -= 1  # the very last token predicts nothing
    lengths = [length for length in lengths if length]
    assert batch.ids.tolist() == ids[:-1]
    assert batch.labels.tolist() == labels[:-1]
    assert batch.positions.tolist() == positions[:-1]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.tokens) == (max(lengths), len(ids) - 1)
    assert batch.rows.tolist() == [row for row, label in enumerate(labels[:-1]) if label != IGNORE]
    assert torch.equal(batch.targets, batch.labels[batch.rows])
    assert {batch.ids.dtype, batch.labels.dtype, batch.positions.dtype, batch.rows.dtype, batch.targets.dtype} == {torch.int64}


def test_the_first_token_of_a_document_is_never_learnt_from_the_one_before(tmp_path):
    cache = cache_of(tmp_path, [[{"role": "assistant", "content": "xxxx"}]])
    batch = make_batch(cache, pack((0, 0, 8), (0, 14, 17)), 0)  # the second segment begins amid the answer
    assert cache.supervised(0)[14]
    assert batch.labels[7] == IGNORE


def test_a_last_document_of_one_token_has_nothing_to_predict_with(tmp_path):
    cache = cache_of(tmp_path, [chat("one")])
    batch = make_batch(cache, pack((0, 0, 8), (0, 8, 9)), 0)
    assert batch.cu_seqlens.tolist() == [0, 8]


def test_an_empty_batch_has_a_token_and_no_label():
    batch = empty_batch()
    assert (len(batch.ids), len(batch.rows), batch.tokens) == (1, 0, 0)
    assert batch.labels.tolist() == [IGNORE]
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen, batch.positions.tolist()) == ([0, 1], 1, [0])


def test_an_empty_batch_has_the_same_kinds_of_tensors_as_a_full_one(cache):
    full, empty = make_batch(cache, pack((0, 0, 40)), 0), empty_batch()
    for name, value in vars(full).items():
        assert type(getattr(empty, name)) is type(value)
        if isinstance(value, torch.Tensor):
            assert (getattr(empty, name).dtype, getattr(empty, name).ndim) == (value.dtype, value.ndim)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_deal_gives_every_pack_once_as_many_to_each_and_no_rank_a_pack_more_of_work(work, ranks):
    dealt = deal(np.array(work), ranks)
    loads = [sum(work[pack] for pack in packs if pack is not None) for packs in dealt]
    assert max(loads) - min(loads) <= max(work)
    assert sorted(pack for packs in dealt for pack in packs if pack is not None) == list(range(len(work)))
    assert {len(packs) for packs in dealt} == {-(-len(work) // ranks)}


def test_deal_balances_better_than_taking_turns():
    work = np.random.default_rng(0).lognormal(6, 1, 64).astype(np.int64)
    loads = [sum(int(work[pack]) for pack in packs) for packs in deal(work, 4)]
    turns = [int(work[rank::4].sum()) for rank in range(4)]
    assert max(loads) < max(turns)
    assert max(loads) / (work.sum() / 4) < 1.05


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_deal_exchanges_packs_where_the_heaviest_first_is_not_enough(seed):
    """Nothing is lighter than an even share, nor than the heaviest pack with the seven lightest."""
    work = np.sort(np.random.default_rng(seed).lognormal(6, 1, 64).astype(np.int64))
    dealt = deal(work, 8)
    heaviest = max(sum(int(work[pack]) for pack in packs) for packs in dealt)
    assert heaviest < 1.002 * max(work.sum() / 8, work[-1] + work[:7].sum())
    assert all(packs == sorted(packs, key=lambda pack: -work[pack]) for packs in dealt)


def test_deal_puts_empty_packs_last():
    dealt = deal(np.array([5, 1, 1, 1, 1]), 3)
    assert sorted(map(len, dealt)) == [2, 2, 2]
    assert [pack for packs in dealt for pack in packs if pack is None] == [None]
    assert all(None not in packs[:-1] for packs in dealt)


def test_deal_of_no_packs_gives_every_rank_none():
    assert deal(np.array([], dtype=np.int64), 2) == [[], []]
