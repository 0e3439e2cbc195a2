"""FSDP2 and recomputation applied from outside: the model knows nothing of them.

Every decoder layer, the embedding and the head is its own group; the final norm goes with the root. Tied embeddings stay with the root as
well, because one parameter cannot belong to two groups. The same code runs at world size 1, where the parameters are DTensors too.
Frozen parameters are gathered like others, from the dtype they are kept in, and take no part in the reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from xtuner_hydra.config.schema import ParallelismConfig
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.runtime import DTYPES, Runtime


def parallelize(model: CausalLM, config: ParallelismConfig, runtime: Runtime) -> None:
    """Recompute the first `recompute_ratio` of the layers and shard everything over the mesh, in place. `model` may be on the meta device.

    `config.param_dtype` must be resolved (not `auto`)."""
    recompute(model, config.recompute_ratio)
    shard(model, runtime.mesh, config, show_progress=runtime.rank == 0)


def recompute(model: CausalLM, ratio: float) -> None:
    """Keep only the input of the first ceil(ratio * layers) decoder layers; their activations are recomputed in the backward pass."""
    layers = list(model.model.layers)
    for layer in layers[: math.ceil(ratio * len(layers))]:
        # wraps forward, not the module: parameter names stay Hugging Face's
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def shard(model: CausalLM, mesh: DeviceMesh, config: ParallelismConfig, *, show_progress: bool = False) -> None:
    """`fully_shard` per layer, embedding, head and root: fp32 master weights, `param_dtype` compute, `reduce_dtype` reduction."""
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[config.param_dtype], reduce_dtype=DTYPES[config.reduce_dtype])
    groups: list[torch.nn.Module] = list(model.model.layers)
    embedding, head = model.model.embed_tokens, model.lm_head
    if head.weight is not embedding.weight:
        groups += [embedding, head]
    for module in tqdm(groups, desc="FSDP sharding", leave=False, disable=None if show_progress else True):  # None: only on a terminal
        # the head's backward pass follows its forward pass at once: freeing its weight between them would only cost a gather
        reshard = config.reshard_after_forward and module is not head
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    if embedding in groups:
        _free_in_training(embedding)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.size() == 1:
        for module in _groups(model):
            module.set_custom_reduce_scatter(cast(Any, _InPlace()))  # torch's name for its type is private


def reshard(model: torch.nn.Module) -> None:
    """Free the weights that a forward pass has gathered."""
    for module in _groups(model):
        module.reshard()


def _free_in_training(embedding: torch.nn.Module) -> None:
    """Free the embedding's weight after its forward pass, and do not gather it for its backward pass, which does not need it. Outside training
    it stays, as generation would gather it again for every token."""
    assert isinstance(embedding, FSDPModule)
    embedding.set_unshard_in_backward(False)
    embedding.register_forward_hook(lambda module, *_: module.reshard() if module.training else None)


def _groups(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class _InPlace:
    """The reduction over one rank, whose result is its input: one buffer for both. With two, FSDP would copy every gradient once more and keep
    the copy until the next group's reduction, so the head's, the largest, through the last layer's backward pass."""

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """FSDP allocates the input first, then, when that is filled, the output, which has the same size on one rank."""
        buffer, self._input = self._input, None
        if buffer is None:
            buffer = self._input = torch.empty(size, dtype=dtype, device=device)
        return buffer

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is sent with one rank")
