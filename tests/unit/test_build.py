"""What is built from a config."""

import os

import pytest

from xtuner_hydra import build
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, MoEConfig
from xtuner_hydra.parallel import allocator


@pytest.mark.parametrize(("moe", "kernels"), [(None, allocator.KERNELS), (MoEConfig(6, 2, 20), {})], ids=["dense", "experts"])
def test_a_dense_model_is_built_with_few_kernels_kept(moe, kernels, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name not in allocator.KERNELS}
    monkeypatch.setattr(os, "environ", environment)

    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "blueprint", stop)
    config = Config(model=ModelConfig("qwen3", 97, 40, 72, 3, 6, 2, 10, moe=moe), data=DataConfig(path="unused"))
    with pytest.raises(KeyboardInterrupt):
        build.build_engine(config, place=None)
    assert {name: environment[name] for name in allocator.KERNELS if name in environment} == kernels
