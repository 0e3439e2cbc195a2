"""From a config to a sharded model with its weights, and to an engine that trains it. Nothing is allocated before it is sharded."""

from __future__ import annotations

from pathlib import Path

from xtuner_hydra.checkpoint.state import load_weights, refuse_other_base
from xtuner_hydra.config.schema import Config
from xtuner_hydra.engine import Engine
from xtuner_hydra.model.adapters import blueprint
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.pretrained import keep_frozen_as_stored, load_pretrained
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.optim.optimizers import build_optimizers
from xtuner_hydra.parallel import allocator
from xtuner_hydra.parallel.runtime import DTYPES, Runtime
from xtuner_hydra.parallel.sharding import parallelize


def build_engine(config: Config, place: Runtime, checkpoint: Path | None = None) -> Engine:
    """The model of `build_model`, with optimizers for what is trained of it."""
    model = build_model(config, place, checkpoint)
    optimizers = build_optimizers(model, config.optimizer, DTYPES[config.parallelism.param_dtype])
    return Engine(
        model, optimizers, dp_size=place.world_size, max_grad_norm=config.optimizer.max_grad_norm, nonfinite=config.optimizer.nonfinite
    )


def build_model(config: Config, place: Runtime, checkpoint: Path | None = None) -> CausalLM:
    """The model, sharded over the ranks of `place`, with the weights of `checkpoint` if given, else its initial ones: those of
    model.pretrained, or random ones."""
    if config.model.moe is None:
        allocator.keep_few_kernels()
    model = blueprint(config)
    if config.model.pretrained:
        keep_frozen_as_stored(model, config.model.pretrained)
    parallelize(model, config.parallelism, place)
    model.to_empty(device=place.device)
    if config.model.pretrained:
        load_pretrained(model, config.model.pretrained, seed=config.trainer.seed)
    else:
        initialise(model, config.trainer.seed)
    if checkpoint is not None:
        refuse_other_base(checkpoint, config.model.pretrained)
        load_weights(checkpoint, model)
    return model
