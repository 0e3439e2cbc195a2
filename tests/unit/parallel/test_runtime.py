"""Ranks and the GPUs that they need."""

import pytest
import torch

from xtuner_hydra.errors import ConfigError
from xtuner_hydra.parallel.runtime import refuse_missing_gpus


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    refuse_missing_gpus("cpu", 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuse_missing_gpus("auto", 2)
    with pytest.raises(ConfigError, match=r"parallelism\.nproc_per_node=3: each rank needs its own GPU, and torch sees 2 here"):
        refuse_missing_gpus("auto", 3)
