"""FSDP2 and recomputation applied from outside: the model knows nothing of them.

Every decoder layer, the embedding and the head are a group of their own, the final norm goes with the root. Tied embeddings stay with the
root as well, because one parameter cannot belong to two groups. The same code runs at world size 1, where the parameters are DTensors too.
Frozen parameters are gathered like others, from whatever dtype they are kept in, and take no part in the reduction."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from xtuner_hydra.config.schema import ParallelismConfig
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.runtime import DTYPES, Runtime


def parallelize(model: CausalLM, config: ParallelismConfig, runtime: Runtime) -> None:
    """Recompute the first layers by `recompute_ratio` and shard everything over the mesh, in place. `model` may be on the meta device.

    `config.param_dtype` must be resolved (not `auto`)."""
    recompute(model, config.recompute_ratio)
    shard(model, runtime.mesh, config, show_progress=runtime.rank == 0)


def recompute(model: CausalLM, ratio: float) -> None:
    """Keep only the input of the first ceil(ratio * layers) decoder layers; their activations are computed again in the backward pass."""
    layers = list(model.model.layers)
    for layer in layers[: math.ceil(ratio * len(layers))]:
        # wraps forward, not the module: parameter names stay Hugging Face's
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def shard(model: CausalLM, mesh: DeviceMesh, config: ParallelismConfig, *, show_progress: bool = False) -> None:
    """`fully_shard` per layer, embedding, head and root: fp32 master weights, `param_dtype` compute, `reduce_dtype` reduction."""
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[config.param_dtype], reduce_dtype=DTYPES[config.reduce_dtype])
    groups: list[torch.nn.Module] = list(model.model.layers)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        groups += [model.model.embed_tokens, model.lm_head]
    for module in tqdm(groups, desc="FSDP sharding", leave=False, disable=None if show_progress else True):  # None: only on a terminal
        # the head's backward pass follows its forward pass at once: freeing its weight between them would only cost a gather
        reshard = config.reshard_after_forward and module is not model.lm_head
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def reshard(model: torch.nn.Module) -> None:
    """Free the weights that a forward pass has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
