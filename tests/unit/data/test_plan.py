import numpy as np
import pytest
from chats import cache_of, chat
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_hydra.config.schema import DataConfig, TrainerConfig
from xtuner_hydra.data.plan import TrainPlan, select_samples, training_limit
from xtuner_hydra.errors import DataError

RECORDS = [chat("x" * (5 + 7 * n), f"question {n}") for n in range(20)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("plan"), RECORDS)


def plan_of(cache, *, batch=3, seed=42, total_steps=None, epochs=None, total_tokens=None, **data):
    data = DataConfig(**{"path": "x", "pack_max_length": 256, **data})
    trainer = TrainerConfig(total_steps=total_steps, epochs=epochs, total_tokens=total_tokens, global_batch_size=batch, seed=seed)
    return TrainPlan(cache, select(cache, data, seed=seed), data, trainer)


def select(cache, data, seed=42):
    return select_samples(cache, data, training_limit(data), seed=seed, sample_ratio=data.sample_ratio, key="data.path")


def samples_of(plan, epoch):
    packs = plan.epoch_packs(epoch)
    return [packs.sample[packs.segments(pack)].tolist() for pack in range(len(packs))]


def test_one_epoch_is_the_default_and_its_last_step_may_be_short(cache):
    plan = plan_of(cache)
    packs = len(plan.epoch_packs(0))
    assert plan.total_steps == -(-packs // 3)
    assert [len(plan.locate(step)[1]) for step in range(plan.total_steps)] == [3] * (packs // 3) + [packs % 3] * (packs % 3 > 0)


def test_total_steps_are_exact_and_cross_epochs(cache):
    plan = plan_of(cache, total_steps=50, batch=4)
    assert plan.total_steps == 50
    epochs = [plan.locate(step)[0] for step in range(50)]
    assert epochs == sorted(epochs)
    assert epochs[-1] > 1
    assert plan.total_tokens == sum(
        int(plan.epoch(epoch).tokens[packs.start : packs.stop].sum()) for epoch, packs in map(plan.locate, range(50))
    )


def test_every_epoch_comes_whole(cache):
    plan = plan_of(cache, epochs=3, batch=2)
    seen = {}
    for step in range(plan.total_steps):
        epoch, packs = plan.locate(step)
        seen.setdefault(epoch, []).extend(packs)
    assert seen == {epoch: list(range(len(plan.epoch_packs(epoch)))) for epoch in range(3)}
    assert [packs.stop - packs.start for _, packs in map(plan.locate, range(plan.total_steps))].count(2) >= plan.total_steps - 3


def test_epochs_after_a_step_count_whole_epochs_and_the_share_of_the_next(cache):
    plan = plan_of(cache, epochs=3, batch=2)
    steps_of = [sum(plan.locate(step)[0] == epoch for step in range(plan.total_steps)) for epoch in range(3)]
    expected = [epoch + step / steps_of[epoch] for epoch in range(3) for step in range(steps_of[epoch])] + [3.0]
    assert [plan.epochs_after(step) for step in range(plan.total_steps + 1)] == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 20_000), batch=st.integers(1, 5))
def test_total_tokens_stops_with_the_step_that_reaches_them(cache, tokens, batch):
    plan = plan_of(cache, total_tokens=tokens, batch=batch)
    fewer = plan_of(cache, total_steps=plan.total_steps - 1, batch=batch).total_tokens if plan.total_steps > 1 else 0
    assert fewer < tokens <= plan.total_tokens


def test_expected_tokens_take_all_epochs_for_the_first(cache):
    plan = plan_of(cache, epochs=3, batch=1)
    assert plan.expected_tokens == pytest.approx(plan.total_tokens, rel=0.1)
    assert plan_of(cache, epochs=1, batch=1).expected_tokens == plan_of(cache, epochs=1, batch=1).total_tokens


def test_a_short_last_step_counts_as_what_it_holds(cache):
    plan = plan_of(cache, epochs=3, batch=len(plan_of(cache).epoch_packs(0)) - 1)  # two steps an epoch, one of them with one pack
    assert plan.expected_tokens == pytest.approx(plan.total_tokens, rel=0.1)


def test_the_tokens_of_very_many_epochs_are_estimated_and_not_counted(cache):
    endless, exact = plan_of(cache, total_steps=10_000_000), plan_of(cache, total_steps=1000)
    assert exact.is_countable
    assert not endless.is_countable
    assert endless.total_tokens == pytest.approx(10_000 * exact.total_tokens, rel=0.05)


@pytest.mark.parametrize("strategy", ["best_fit", "soft", "hard", "none"])
def test_an_epoch_holds_every_sample_and_the_next_has_another_order(cache, strategy):
    plan = plan_of(cache, pack_strategy=strategy, epochs=2)
    for epoch in (0, 1):
        assert {sample for pack in samples_of(plan, epoch) for sample in pack} == set(range(20))
    assert samples_of(plan, 0) != samples_of(plan, 1)
    assert samples_of(plan, 0) == samples_of(plan_of(cache, pack_strategy=strategy, epochs=2), 0)
    assert samples_of(plan, 0) != samples_of(plan_of(cache, pack_strategy=strategy, epochs=2, seed=1), 0)


@pytest.mark.parametrize("strategy", ["best_fit", "soft", "hard", "none"])
def test_without_shuffle_epochs_are_alike(cache, strategy):
    plan = plan_of(cache, pack_strategy=strategy, shuffle=False, epochs=2)
    assert samples_of(plan, 0) == samples_of(plan, 1)
    if strategy in ("soft", "hard", "none"):
        order = [sample for pack in samples_of(plan, 0) for sample in pack]
        assert order == sorted(order)


@pytest.mark.parametrize(("ratio", "times"), [(1.0, {1}), (2.0, {2}), (2.5, {2, 3}), (0.5, {0, 1})])
def test_sample_ratio_repeats_and_draws(cache, ratio, times):
    selection = select(cache, DataConfig(path="x", sample_ratio=ratio))
    counts = np.bincount(selection.samples, minlength=20)
    assert (counts.sum(), set(counts.tolist())) == (20 * ratio, times)
    again = select(cache, DataConfig(path="x", sample_ratio=ratio))
    np.testing.assert_array_equal(selection.samples, again.samples)
    other = select(cache, DataConfig(path="x", sample_ratio=ratio), seed=43)
    assert np.array_equal(selection.samples, other.samples) == ratio.is_integer()


def test_the_fraction_is_drawn_once_not_in_every_epoch(cache):
    plan = plan_of(cache, sample_ratio=0.5, epochs=2)
    first, second = ({sample for pack in samples_of(plan, epoch) for sample in pack} for epoch in (0, 1))
    assert first == second
    assert len(first) == 10


def test_a_ratio_that_leaves_no_sample_is_refused(cache):
    with pytest.raises(DataError, match=r"data\.path: .*sample_ratio leaves none of the 20 samples"):
        select(cache, DataConfig(path="x", sample_ratio=0.01))


def test_overlong_samples_are_cut_dropped_or_refused(cache):
    longest = int(cache.lengths.max())
    over = int((cache.lengths > 100).sum())
    cut = select(cache, DataConfig(path="x", max_length=100))
    assert (cut.truncated, cut.lengths.max()) == (over, 100)
    dropped = select(cache, DataConfig(path="x", max_length=100, overlong="drop"))
    assert (dropped.dropped, len(dropped)) == (over, 20 - over)
    whole = select(cache, DataConfig(path="x", pack_strategy="hard", pack_max_length=64))
    assert (whole.truncated, whole.lengths.max()) == (0, longest)
    with pytest.raises(DataError, match=rf"data\.jsonl line 20: {longest} tokens, longer than data\.max_length={longest - 1}\."):
        select(cache, DataConfig(path="x", max_length=longest - 1, overlong="error"))
    with pytest.raises(DataError, match=rf"line 20: {longest} tokens, longer than data\.pack_max_length={longest - 1}\."):
        select(cache, DataConfig(path="x", pack_max_length=longest - 1, overlong="error"))
    assert len(select(cache, DataConfig(path="x", max_length=longest, overlong="error"))) == 20
    with pytest.raises(DataError, match=r"every sample is longer than allowed"):
        select(cache, DataConfig(path="x", max_length=10, overlong="drop"))


def test_a_sample_cut_before_the_assistant_speaks_is_left_out_and_counted(tmp_path):
    cache = cache_of(tmp_path, [chat("answer", "q" * 200), chat("answer")])
    selection = select(cache, DataConfig(path="x", max_length=100))
    assert (selection.samples.tolist(), selection.unsupervised) == ([1], 1)
    with pytest.raises(DataError, match="no supervised token"):
        select(cache_of(tmp_path, [chat("answer", "q" * 200)]), DataConfig(path="x", max_length=100))


def test_the_counts_of_an_epoch_are_those_of_its_packs(cache):
    plan = plan_of(cache, pack_strategy="hard", pack_max_length=64)
    epoch = plan.epoch(0)
    for pack in range(len(epoch.packs)):
        s = epoch.packs.segments(pack)
        pieces = zip(epoch.packs.sample[s], epoch.packs.start[s], epoch.packs.stop[s], strict=True)
        labels = [cache.supervised(sample)[start + 1 : stop].sum() for sample, start, stop in pieces]
        assert epoch.supervised_tokens[pack] == sum(labels) > 0
        assert epoch.tokens[pack] == epoch.packs.lengths[pack] - 1


@pytest.mark.parametrize("duration", [{"epochs": 1}, {"total_tokens": 10}])
def test_a_hard_cut_before_every_label_is_refused_not_waited_for(tmp_path, duration):
    cache = cache_of(tmp_path, [chat("")])
    label = int(cache.supervised(0).argmax())
    with pytest.raises(DataError, match=f"no pack of epoch 0 holds a supervised token.* every {label} tokens"):
        plan_of(cache, pack_strategy="hard", pack_max_length=label, **duration)


def test_what_is_said_to_change_the_order_does(cache, tmp_path):
    orders = [
        plan_of(cache, **data).epoch_packs(0) for data in ({}, {"pack_max_length": 300}, {"pack_strategy": "soft"}, {"shuffle": False})
    ]
    orders.append(plan_of(cache_of(tmp_path, RECORDS[1:])).epoch_packs(0))
    assert len({(tuple(packs.sample), tuple(packs.offsets)) for packs in orders}) == 5
