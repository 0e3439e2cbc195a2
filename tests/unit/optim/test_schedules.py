"""Schedules against torch's own and against the published formula."""

import pytest
import torch

from xtuner_hydra.config.schema import SchedulerConfig
from xtuner_hydra.optim.schedules import cut_short, learning_rate, warmup_steps


def rates(total, lr=1.0, **config):
    return [learning_rate(SchedulerConfig(**config), step, total, lr) for step in range(total)]


def torch_rates(scheduler, total, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(optimizer, **options)
    seen = []
    for _ in range(total):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_is_torchs():
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 20, T_max=20, eta_min=0.1)
    assert rates(20, name="cosine", lr_min=0.1, warmup_ratio=0.0) == pytest.approx(expected)


def test_linear_is_torchs():
    expected = torch_rates(torch.optim.lr_scheduler.LinearLR, 20, start_factor=1.0, end_factor=0.1, total_iters=20)
    assert rates(20, name="linear", lr_min=0.1, warmup_ratio=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_starts_above_zero_rises_to_the_peak_and_hands_over_there(name):
    seen = rates(10, name=name, lr_min=0.0, warmup_steps=4)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert seen[4] == pytest.approx(1.0)


def test_warm_up_ratio_is_rounded_down():
    assert warmup_steps(SchedulerConfig(warmup_ratio=0.03), 32) == 0
    assert warmup_steps(SchedulerConfig(warmup_ratio=0.03), 34) == 1


def test_a_zero_learning_rate_stays_zero():
    assert rates(5, lr=0.0, name="constant", warmup_steps=2) == [0.0] * 5


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("lr", [0.0, 0.05])
def test_a_peak_below_lr_min_is_never_raised(name, lr):
    assert rates(6, lr=lr, name=name, lr_min=0.1, warmup_ratio=0.0) == pytest.approx([lr] * 6)


def test_wsd_is_constant_then_goes_down_in_a_straight_line():
    seen = rates(10, name="wsd", lr_min=0.0, warmup_steps=2, decay_ratio=0.4)
    assert seen == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(("decay_ratio", "expected"), [(0.0, [1.0] * 4), (1.0, [1.0, 0.75, 0.5, 0.25])])
def test_wsd_at_its_limits(decay_ratio, expected):
    assert rates(4, name="wsd", lr_min=0.0, warmup_ratio=0.0, decay_ratio=decay_ratio) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"warmup_ratio": 0.03}, []),
        ({"name": "wsd", "warmup_steps": 2, "decay_ratio": 0.8}, []),
        (
            {"name": "wsd", "warmup_steps": 5, "decay_ratio": 0.8},
            ["scheduler.decay_ratio=0.8: 5 steps instead of 8, as the others warm up"],
        ),
        ({"name": "wsd", "decay_ratio": 0.1}, ["scheduler.decay_ratio=0.1: 1 of 10 steps, too few for the rate to fall"]),
        ({"warmup_steps": 11}, ["scheduler.warmup_steps=11: cut to the run's 10 steps, all of which warm up"]),
    ],
)
def test_what_a_run_is_too_short_for_is_told(config, words):
    assert cut_short(SchedulerConfig(**config), 10) == words
