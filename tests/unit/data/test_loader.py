import threading
from itertools import pairwise

import pytest
from chats import cache_of, chat

from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, TrainerConfig
from xtuner_hydra.data import loader
from xtuner_hydra.data.loader import eval_batches, step_batch, train_batches
from xtuner_hydra.data.plan import EVAL_PACK, TrainPlan, select_samples, training_limit

DATA = DataConfig(path="x", pack_max_length=128)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("loader"), [chat("x" * (1 + 5 * n), f"question {n}") for n in range(15)])


@pytest.fixture(scope="module")
def plan(cache):
    selection = select_samples(cache, DATA, training_limit(DATA), seed=1, sample_ratio=1.0, key="data.path")
    return TrainPlan(cache, selection, DATA, TrainerConfig(epochs=2, global_batch_size=4))


def documents(batches):
    """The documents of batches, whatever pack they are in, as sorted lists of ids."""
    found = []
    for batch in batches:
        ends = batch.cu_seqlens.tolist()
        found += [batch.ids[start:stop].tolist() for start, stop in pairwise(ends)] if batch.tokens else []
    return sorted(found)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_step_is_the_same_documents_on_any_number_of_ranks(plan, ranks):
    for step in range(plan.total_steps):
        alone = step_batch(plan, step, 0, 1)
        parts = [step_batch(plan, step, rank, ranks) for rank in range(ranks)]
        assert documents(micro for part in parts for micro in part.micro_batches) == documents(alone.micro_batches)
        assert {len(part.micro_batches) for part in parts} == {-(-alone.packs // ranks)}
        assert {(part.tokens, part.supervised_tokens) for part in parts} == {(alone.tokens, alone.supervised_tokens)}
        assert alone.tokens == sum(micro.tokens for micro in alone.micro_batches)
        assert alone.supervised_tokens == sum(len(micro.targets) for micro in alone.micro_batches)
        assert {part.utilization for part in parts} == {(alone.tokens + alone.packs) / (alone.packs * 128)}
        assert {tuple(part.samples) for part in parts} == {tuple(alone.samples)}


def test_a_step_says_which_samples_it_holds(cache, plan):
    for step in range(plan.total_steps):
        batch = step_batch(plan, step, 0, 1)
        whole = sorted(cache.ids(sample).tolist() for sample in batch.samples)
        assert len(batch.samples) == len(documents(batch.micro_batches))
        assert all(short in (long, long[:-1]) for short, long in zip(documents(batch.micro_batches), whole, strict=True))


def test_the_steps_are_those_of_the_plan(plan):
    batches = list(train_batches(plan, start_step=0, dp_rank=0, dp_size=1))
    assert [batch.step for batch in batches] == list(range(plan.total_steps))
    assert [batch.epoch for batch in batches] == [plan.locate(step)[0] for step in range(plan.total_steps)]
    assert sum(batch.tokens for batch in batches) == plan.total_tokens


def test_starting_later_gives_the_rest(plan):
    whole = [documents(batch.micro_batches) for batch in train_batches(plan, start_step=0, dp_rank=0, dp_size=1)]
    rest = [documents(batch.micro_batches) for batch in train_batches(plan, start_step=3, dp_rank=0, dp_size=1)]
    assert len(whole) == plan.total_steps
    assert rest == whole[3:]
    assert list(train_batches(plan, start_step=plan.total_steps, dp_rank=0, dp_size=1)) == []


def test_closing_ends_the_thread(plan):
    batches = train_batches(plan, start_step=0, dp_rank=0, dp_size=1)
    next(batches)
    assert any(thread.name == "batches" for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name == "batches" for thread in threading.enumerate())


def test_an_error_in_the_thread_reaches_the_loop(plan, monkeypatch):
    def fail(*args):
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader, "step_batch", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        next(train_batches(plan, start_step=0, dp_rank=0, dp_size=1))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluation_sees_every_sample_once_in_equal_numbers_of_batches(cache, plan, ranks):
    shares = [list(eval_batches(cache, plan.selection, Config(data=DATA), dp_rank=rank, dp_size=ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sum(len(micro.targets) for share in shares for micro in share) == cache.supervised_lengths.sum()
    found = documents(micro for share in shares for micro in share)
    assert all(
        short in (long, long[:-1]) for short, long in zip(found, sorted(cache.ids(i).tolist() for i in range(len(cache))), strict=True)
    )


@pytest.mark.parametrize("pack_max_length", [64, 1000])
def test_evaluation_with_hard_cuts_sees_the_same_labels_whatever_the_training_s_packs(cache, pack_max_length):
    """Every token that is to be learnt but the first of each pack of held-out data."""
    data = DataConfig(path="x", pack_max_length=pack_max_length, pack_strategy="hard")
    selection = select_samples(cache, data, training_limit(data), seed=1, sample_ratio=1.0, key="data.eval_path")
    stream = [
        (token, learnt) for sample in range(len(cache)) for token, learnt in zip(cache.ids(sample), cache.supervised(sample), strict=True)
    ]
    expected = [int(token) for place, (token, learnt) in enumerate(stream) if learnt and place % EVAL_PACK]
    found = [
        target for batch in eval_batches(cache, selection, Config(data=data), dp_rank=0, dp_size=1) for target in batch.targets.tolist()
    ]
    assert sorted(found) == sorted(expected)


def test_evaluation_with_hard_cuts_stays_within_the_models_positions(cache):
    data = DataConfig(path="x", pack_strategy="hard")
    config = Config(data=data, model=ModelConfig(max_position_embeddings=50))
    selection = select_samples(cache, data, training_limit(data), seed=1, sample_ratio=1.0, key="data.eval_path")
    assert max(batch.tokens for batch in eval_batches(cache, selection, config, dp_rank=0, dp_size=1)) < 50
