"""What a run sees of its data, over all its steps, epochs and ranks, against the obvious way: no token twice, none left out, each label where it
belongs. For any lengths, masks, packings and numbers of ranks."""

from collections import Counter
from itertools import pairwise

import numpy as np
from chats import cache_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xtuner_hydra.config.schema import Config, DataConfig, TrainerConfig
from xtuner_hydra.data.batch import IGNORE
from xtuner_hydra.data.loader import eval_batches, step_batch, train_batches
from xtuner_hydra.data.plan import EVAL_PACK, Selection, TrainPlan, select_samples, training_limit
from xtuner_hydra.errors import DataError

CAPACITY = 16
STRATEGIES = ("best_fit", "soft", "hard", "none")


class FakeCache:
    """Samples in memory, with what a plan asks of a TokenCache. Every token of all samples is another number, so that each can be told."""

    fingerprint = "fake"
    files = ("fake",)

    def __init__(self, masks):
        self.masks = [np.array([False, *mask[1:]]) for mask in masks]
        self.lengths = np.array([len(mask) for mask in masks])
        self.supervised_lengths = np.array([mask.sum() for mask in self.masks])
        self.firsts = np.cumsum(self.lengths) - self.lengths

    def __len__(self):
        return len(self.lengths)

    def ids(self, sample):
        return np.arange(self.firsts[sample], self.firsts[sample] + self.lengths[sample], dtype=np.uint32)

    def supervised(self, sample):
        return self.masks[sample]


MASKS = st.lists(st.booleans(), min_size=2, max_size=CAPACITY).filter(lambda mask: any(mask[1:]))
CACHES = st.lists(MASKS, min_size=1, max_size=25).map(FakeCache)


def plan_of(cache, strategy, *, batch=3, shuffle=True, **duration):
    data = DataConfig(path="x", pack_max_length=CAPACITY, pack_strategy=strategy, shuffle=shuffle)
    everything = Selection(np.arange(len(cache)), cache.lengths)
    return TrainPlan(cache, everything, data, TrainerConfig(global_batch_size=batch, seed=7, **duration))


def predictions(batch):
    """(position in its document, token, the next token or None where that is no label) of each token that is fed."""
    if not batch.tokens:
        return []
    labels = [None if label == IGNORE else label for label in batch.labels.tolist()]
    return list(zip(batch.positions.tolist(), batch.ids.tolist(), labels, strict=True))


@settings(deadline=None, max_examples=60)
@given(CACHES, st.sampled_from(("best_fit", "soft", "none")), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_an_epoch_teaches_each_label_once_from_the_token_before_it_on_any_number_of_ranks(cache, strategy, batch, ranks, shuffle):
    plan = plan_of(cache, strategy, batch=batch, shuffle=shuffle, epochs=2)
    expected = Counter()
    for sample in range(len(cache)):
        ids = cache.ids(sample).tolist()
        for place in range(1, len(ids)):
            if cache.masks[sample][place]:
                expected[(place - 1, ids[place - 1], ids[place])] += 1
    seen = {0: Counter(), 1: Counter()}
    tokens = 0
    for step in range(plan.total_steps):
        parts = [step_batch(plan, step, rank, ranks) for rank in range(ranks)]
        assert len({len(part.micro_batches) for part in parts}) == 1  # or the collectives of one rank would wait for another's
        fed = [one for part in parts for micro in part.micro_batches for one in predictions(micro)]
        learnt = [one for one in fed if one[2] is not None]
        seen[parts[0].epoch].update(learnt)
        assert {(part.tokens, part.supervised_tokens, part.packs) for part in parts} == {(len(fed), len(learnt), parts[0].packs)}
        assert Counter(parts[0].samples).total() == len(set(parts[0].samples))
        tokens += len(fed)
    assert seen == {0: expected, 1: expected}
    assert tokens == plan.total_tokens


@settings(deadline=None, max_examples=40)
@given(CACHES, st.integers(2, CAPACITY), st.integers(1, 4))
def test_hard_cuts_lose_only_the_labels_that_begin_a_pack(cache, capacity, ranks):
    data = DataConfig(path="x", pack_max_length=capacity, pack_strategy="hard", shuffle=False)
    stream = [(int(token), bool(learnt)) for s in range(len(cache)) for token, learnt in zip(cache.ids(s), cache.masks[s], strict=True)]

    def labels(pack_length):
        return sorted(token for place, (token, learnt) in enumerate(stream) if learnt and place % pack_length)

    expected = labels(capacity)
    assume(expected)  # a plan without a label is refused
    selection = Selection(np.arange(len(cache)), cache.lengths)
    plan = TrainPlan(cache, selection, data, TrainerConfig(global_batch_size=2, epochs=1))
    parts = [step_batch(plan, step, rank, ranks) for step in range(plan.total_steps) for rank in range(ranks)]
    assert sorted(token for part in parts for micro in part.micro_batches for token in micro.targets.tolist()) == expected
    assert sum(part.supervised_tokens for part in parts) == ranks * len(expected)
    held = [micro for rank in range(ranks) for micro in eval_batches(cache, selection, Config(data=data), dp_rank=rank, dp_size=ranks)]
    assert sorted(token for micro in held for token in micro.targets.tolist()) == labels(EVAL_PACK)  # whatever the pack length of training


@settings(deadline=None, max_examples=60)
@given(CACHES, st.sampled_from(STRATEGIES), st.integers(1, 6), st.data())
def test_the_cursor_finds_every_step_of_every_epoch_once_from_wherever_it_is_asked(cache, strategy, batch, data):
    epochs = data.draw(st.integers(1, 4), "epochs")
    try:
        plan = plan_of(cache, strategy, batch=batch, epochs=epochs)
        packs_of = [len(plan.epoch_packs(epoch)) for epoch in range(epochs + 1)]  # one more than is trained, as total_steps may cross any
    except DataError:
        assume(False)  # a hard cut before every label
    expected, after = [], [0.0]
    for epoch, packs in enumerate(packs_of):
        edges = [*range(0, packs, batch), packs]
        expected += [(epoch, range(start, stop)) for start, stop in pairwise(edges)]
        after += [epoch + done / (len(edges) - 1) for done in range(1, len(edges))]
    assert plan.total_steps == sum(epoch < epochs for epoch, _ in expected)
    fresh = plan_of(cache, strategy, batch=batch, epochs=epochs)  # what it has been asked before must not matter
    for step in data.draw(st.permutations(range(len(expected))), "order"):
        assert fresh.locate(step) == expected[step]
        assert abs(fresh.epochs_after(step + 1) - after[step + 1]) < 1e-9
    assert fresh.epochs_after(0) == 0
    assert all(len(packs) == batch for epoch, packs in expected if packs.stop < packs_of[epoch])  # only an epoch's last is short


@settings(deadline=None, max_examples=60)
@given(CACHES, st.sampled_from(("best_fit", "soft", "none")), st.integers(1, 6), st.integers(1, 400))
def test_total_tokens_and_total_steps_are_counted_as_one_would(cache, strategy, batch, wanted):
    by_steps = plan_of(cache, strategy, batch=batch, total_steps=1 + wanted % 20)
    seen = steps = epoch = 0
    counts = []
    while seen < wanted or steps < by_steps.total_steps:
        lengths = by_steps.epoch_packs(epoch).lengths.tolist()
        for start in range(0, len(lengths), batch):
            counts.append(sum(length - 1 for length in lengths[start : start + batch]))
            seen, steps = seen + counts[-1], steps + 1
        epoch += 1
    assert by_steps.total_tokens == sum(counts[: by_steps.total_steps])
    by_tokens = plan_of(cache, strategy, batch=batch, total_tokens=wanted)
    running = np.cumsum(counts)
    assert by_tokens.total_steps == int((running < wanted).sum()) + 1
    assert by_tokens.total_tokens == running[by_tokens.total_steps - 1] >= wanted


@settings(deadline=None, max_examples=25)
@given(CACHES, st.sampled_from(("best_fit", "soft", "none")), st.data())
def test_a_run_that_stops_and_goes_on_sees_what_one_that_did_not_would_have(cache, strategy, data):
    plan = plan_of(cache, strategy, batch=2, epochs=2)
    stop = data.draw(st.integers(0, plan.total_steps), "stop")
    ranks = data.draw(st.integers(1, 3), "ranks")

    def samples(start, size):
        return [(batch.epoch, batch.step, batch.samples) for batch in train_batches(plan, start_step=start, dp_rank=size - 1, dp_size=size)]

    assert samples(0, 1)[:stop] + samples(stop, ranks) == samples(0, 1)


@settings(deadline=None, max_examples=60)
@given(CACHES, st.integers(2, CAPACITY + 4), st.sampled_from(("truncate", "drop")), st.floats(0.2, 3.0), st.integers(0, 5))
def test_every_sample_is_used_cut_dropped_or_has_nothing_to_teach(cache, limit, overlong, ratio, seed):
    data = DataConfig(path="x", max_length=limit, overlong=overlong)
    drawn = round((ratio - int(ratio)) * len(cache)) + int(ratio) * len(cache)
    taught = [bool(mask[:limit].any()) for mask in cache.masks]
    kept = [taught[s] and (overlong == "truncate" or cache.lengths[s] <= limit) for s in range(len(cache))]
    try:
        chosen = select_samples(cache, data, training_limit(data), seed=seed, sample_ratio=ratio, key="data.path")
    except DataError:
        assert not drawn or not all(kept)  # which are drawn is random: it may be those of which nothing is left
        return
    assert len(chosen) + chosen.dropped + chosen.unsupervised == drawn
    assert len(chosen) == drawn or not all(kept)
    counts = np.bincount(chosen.samples, minlength=len(cache))
    for sample, count in enumerate(counts.tolist()):
        assert count in ((int(ratio), int(ratio) + 1) if kept[sample] else (0,))
    assert chosen.lengths.tolist() == [min(int(cache.lengths[sample]), limit) for sample in chosen.samples]
    assert chosen.truncated == sum(int(cache.lengths[sample]) > limit for sample in chosen.samples)


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "pretrain", "developer"])
MESSAGES = st.fixed_dictionaries(
    {"role": ROLES, "content": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)},
    optional={"loss": st.booleans()},
)
LEARNT = {"role": "assistant", "content": "yes"}


def by_hand(messages):
    """(bytes and markers, labels) of a chat in the byte tokenizer's ChatML, as its documentation has it."""
    ids, learnt = [], []
    for message in messages:
        role = {"developer": "system", "pretrain": "assistant", "tool": "user"}.get(message["role"], message["role"])
        text = message["content"]
        if message["role"] == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
        header, body = [256, *f"{role}\n".encode()], [*text.encode(), 257]
        on = message.get("loss", message["role"] in ("assistant", "pretrain"))
        ids += [*header, *body, *b"\n"]
        learnt += [False] * len(header) + [on] * len(body) + [False]
    return ids, learnt


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(MESSAGES, max_size=4).map(lambda chat: [*chat, LEARNT]), min_size=1, max_size=8), st.integers(1, 3))
def test_the_labels_of_a_run_are_those_that_the_messages_say(tmp_path_factory, chats, ranks):
    """From the file through cache, packs and ranks, against a mask made by hand."""
    cache = cache_of(tmp_path_factory.mktemp("labels"), chats)
    data = DataConfig(path="x", pack_max_length=1024)
    selection = select_samples(cache, data, training_limit(data), seed=1, sample_ratio=1.0, key="data.path")
    plan = TrainPlan(cache, selection, data, TrainerConfig(global_batch_size=2, epochs=1))
    documents = Counter()
    for step in range(plan.total_steps):
        for rank in range(ranks):
            for micro in step_batch(plan, step, rank, ranks).micro_batches:
                fed = predictions(micro)
                starts = [place for place, (position, _, _) in enumerate(fed) if position == 0]
                for start, stop in pairwise([*starts, len(fed)]):
                    pairs = [(token, label) for _, token, label in fed[start:stop]]
                    # a document's last token, a line end, is fed only where another document follows, and has no label
                    documents[tuple(pairs[:-1] if pairs[-1] == (10, None) else pairs)] += 1
    expected = Counter()
    for chat in chats:
        ids, learnt = by_hand(chat)
        following = [token if on else None for token, on in zip(ids[1:], learnt[1:], strict=True)]
        expected[tuple(zip(ids[:-1], following, strict=True))] += 1
    assert documents == expected
