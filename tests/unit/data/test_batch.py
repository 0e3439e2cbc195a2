import numpy as np
import torch
from chats import cache_of, chat
from hypothesis import given
from hypothesis import strategies as st

from xtuner_hydra.data.batch import IGNORE, deal, empty_batch, make_batch
from xtuner_hydra.data.packing import Packs


def pack(*segments):
    sample, start, stop = (np.array(column) for column in zip(*segments, strict=True))
    return Packs(sample, start, stop, np.array([0, len(segments)]))


def test_documents_are_shifted_each_for_itself(tmp_path):
    """Against the obvious way: each document's tokens, their successors, positions from 0."""
    cache = cache_of(tmp_path, [chat("one"), chat("three three"), chat("two")])
    segments = [(1, 0, 30), (0, 0, int(cache.lengths[0])), (2, 10, int(cache.lengths[2]))]
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
    assert batch.ids.tolist() == ids[:-1]
    assert batch.labels.tolist() == labels[:-1]
    assert batch.positions.tolist() == positions[:-1]
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.tokens) == (max(lengths), len(ids) - 1)
    assert batch.rows.tolist() == [row for row, label in enumerate(labels[:-1]) if label != IGNORE]
    torch.testing.assert_close(batch.targets, batch.labels[batch.rows])


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


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_deal_gives_every_pack_once_and_as_many_to_each(work, ranks):
    dealt = deal(np.array(work), ranks)
    assert sorted(pack for packs in dealt for pack in packs if pack is not None) == list(range(len(work)))
    assert {len(packs) for packs in dealt} == {-(-len(work) // ranks)}


def test_deal_balances_better_than_taking_turns():
    work = np.random.default_rng(0).lognormal(6, 1, 64).astype(np.int64)
    loads = [sum(int(work[pack]) for pack in packs) for packs in deal(work, 4)]
    turns = [int(work[rank::4].sum()) for rank in range(4)]
    assert max(loads) < max(turns)
    assert max(loads) / (work.sum() / 4) < 1.05
