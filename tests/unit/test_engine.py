"""A step that must not be made is not made: nothing of it is left in weights, moments or gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from xtuner_hydra.build import build_engine
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.data.batch import PackedBatch
from xtuner_hydra.errors import Stopped, TrainingError
from xtuner_hydra.parallel.runtime import runtime


def config_of(nonfinite="error", **parallelism):
    return Config(
        model=ModelConfig(
            vocab_size=31,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            tokenizer="byte",
        ),
        data=DataConfig(path="unused"),
        optimizer=OptimizerConfig(nonfinite=nonfinite),
        parallelism=ParallelismConfig(param_dtype="float32", **parallelism),
        trainer=TrainerConfig(seed=3, device="cpu"),
    )


def batch(seed, length=9):
    """A pack of one document, every token supervised."""
    ids = torch.randint(0, 31, (length,), generator=torch.Generator().manual_seed(seed))
    cu_seqlens, places = torch.tensor([0, length - 1], dtype=torch.int32), torch.arange(length - 1)
    return PackedBatch(ids[:-1], places, cu_seqlens, length - 1, rows=places, targets=ids[1:], tokens=length - 1)


def take_step(engine, seeds, world_size=1):
    return engine.train_step([batch(seed) for seed in seeds], 8 * len(seeds) * world_size, lr=0.1)


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def memory(engine):
    """Every weight and moment, by name."""
    named = dict(engine.model.named_parameters())
    weights = {name: local(parameter).clone() for name, parameter in named.items()}
    states = {name: engine.optimizers[0].state.get(parameter, {}) for name, parameter in named.items()}
    return weights | {f"{name}/{key}": copy.deepcopy(local(value)) for name, state in states.items() for key, value in state.items()}


def differing(before, after):
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def gradients(engine):
    return [name for name, parameter in engine.model.named_parameters() if parameter.grad is not None]


def poison(engine, *names, value=float("nan"), rank=0):
    """Once, from the next backward pass on, put `value` into the last entry of `rank`'s part of the gradients of `names`."""
    norm = engine._norm

    def norm_poisoned():
        engine._norm = norm
        for name in names:
            part = local(engine.model.get_parameter(name).grad)
            if dist.get_rank() == rank:
                part.view(-1)[-1] = value
        return norm()

    engine._norm = norm_poisoned


@pytest.fixture(scope="module")
def place():
    with runtime(config_of()) as here:
        yield here


@pytest.fixture
def engine(place):
    """One that has taken a step."""
    return trained(config_of(), place)


def trained(config, place):
    engine = build_engine(config, place)
    take_step(engine, [1, 2], place.world_size)
    return engine


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_parameters(engine, value):
    before = memory(engine)
    poison(engine, "model.layers.1.mlp.up_proj.weight", "lm_head.weight", value=value)
    with pytest.raises(TrainingError, match=r"; not finite: the gradients of model\.layers\.1\.mlp\.up_proj\.weight, lm_head\.weight;"):
        take_step(engine, [3, 4])
    assert differing(before, memory(engine)) == []
    assert gradients(engine) == []


def test_of_many_parameters_the_first_are_named(engine):
    poison(engine, *(name for name, _ in engine.model.named_parameters()))
    with pytest.raises(TrainingError, match=r"; not finite: the gradients of (\S+, ){4}\S+ and \d+ more;"):
        take_step(engine, [3])


def test_weights_that_are_not_finite_are_told_from_gradients(engine):
    """As pretrained ones may be: no learning rate helps."""
    with torch.no_grad():
        local(engine.model.get_parameter("model.norm.weight"))[0] = float("nan")
    with pytest.raises(TrainingError, match=r"loss nan; not finite already before this step: the weights of model\.norm\.weight;"):
        take_step(engine, [3])


def test_a_gradient_that_is_skipped_changes_nothing_and_the_next_is_made(place):
    engine, twin = (trained(config_of("skip"), place) for _ in range(2))
    before = memory(engine)
    poison(engine, "lm_head.weight")
    result = take_step(engine, [3, 4])
    assert not result.updated
    assert result.grad_norm != result.grad_norm  # NaN
    assert differing(before, memory(engine)) == []
    assert gradients(engine) == []
    assert take_step(engine, [5, 6]).updated
    take_step(twin, [5, 6])
    assert differing(memory(engine), memory(twin)) == []
    assert differing(before, memory(engine)) != []


def poisoned_on_a_rank(policy):
    """(message or whether it was updated, what changed) where the second rank's part alone is bad."""
    with runtime(config_of()) as place:
        engine = trained(config_of(policy), place)
        before = memory(engine)
        poison(engine, "model.layers.0.self_attn.q_proj.weight", rank=1)
        try:
            told = take_step(engine, [3 + place.rank], place.world_size).updated
        except TrainingError as error:
            told = str(error)
        return told, differing(before, memory(engine)), gradients(engine)


def test_all_ranks_name_a_parameter_of_which_one_ranks_part_is_bad():
    first, second = run_on_ranks(poisoned_on_a_rank, 2, "error")
    assert first == second
    assert "; not finite: the gradients of model.layers.0.self_attn.q_proj.weight; the update was not made" in first[0]
    assert first[1:] == ([], [])


def test_all_ranks_skip_where_one_ranks_part_is_bad():
    assert run_on_ranks(poisoned_on_a_rank, 2, "skip") == [(False, [], [])] * 2


def stop_at(edge):
    """What to put in at_edge: raises at the `edge`-th time, counted from 1."""
    left = iter(range(edge - 1, -1, -1))

    def at_edge():
        if next(left) == 0:
            raise Stopped("asked to", 75)

    return at_edge


@pytest.mark.parametrize("edge", [1, 2, 3])
@pytest.mark.parametrize("reshard", [True, False])
def test_a_step_that_is_broken_off_has_not_been(place, edge, reshard):
    """Weights, moments and gradients are as before it, and the step is made as if there had been no attempt."""
    config = config_of(reshard_after_forward=reshard)
    engine, twin = (trained(config, place) for _ in range(2))
    before, at_edge = memory(engine), engine.at_edge
    engine.at_edge = stop_at(edge)
    with pytest.raises(Stopped):
        take_step(engine, [3, 4, 5])
    assert all(isinstance(parameter, DTensor) for parameter in engine.model.parameters())
    assert differing(before, memory(engine)) == []
    assert gradients(engine) == []
    engine.at_edge = at_edge
    results = [take_step(one, [3, 4, 5]) for one in (engine, twin)]
    assert results[0].grad_norm == results[1].grad_norm
    assert differing(memory(engine), memory(twin)) == []


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("edge", [1, 2])
def test_an_evaluation_that_is_broken_off_leaves_a_model_that_trains(place, edge, reshard):
    config = config_of(reshard_after_forward=reshard)
    engine, twin = (trained(config, place) for _ in range(2))
    before = memory(engine)
    engine.at_edge = stop_at(edge)
    with pytest.raises(Stopped):
        engine.evaluate(map(batch, (7, 8)))
    assert all(module.training for module in engine.model.modules())
    assert all(isinstance(parameter, DTensor) for parameter in engine.model.parameters())
    assert differing(before, memory(engine)) == []
    engine.at_edge = lambda: None
    for one in (engine, twin):
        take_step(one, [9])
    assert differing(memory(engine), memory(twin)) == []
