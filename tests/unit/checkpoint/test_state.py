"""What a checkpoint takes leaves training as it is."""

import pytest
import torch

from xtuner_hydra.checkpoint.state import trained_tensors
from xtuner_hydra.config.schema import OptimizerConfig
from xtuner_hydra.optim.optimizers import build_optimizers


def trained(name, look_first):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizers = build_optimizers(model, OptimizerConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0.9), torch.float32)
    if look_first:
        tensors = trained_tensors(model, optimizers)
        assert not any(value.any() for key, value in tensors.items() if key.startswith("optimizer.state."))
    for _ in range(3):
        model(torch.randn(2, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return trained_tensors(model, optimizers)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_look_before_the_first_update_changes_no_bit(name):
    """A checkpoint after a first update that was left out."""
    plain, looked_at = trained(name, look_first=False), trained(name, look_first=True)
    assert any(key.startswith("optimizer.state.") for key in plain)
    assert plain.keys() == looked_at.keys()
    for key, value in plain.items():
        assert torch.equal(value, looked_at[key]), key
