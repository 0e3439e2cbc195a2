"""Initial weights: a function of the seed and the parameter's name, so the same bits on any number of ranks, mesh or sharding.

A parameter's full value is made on the CPU in blocks, each from its own random generator (seed, name, number of the block), so that threads
can share the work; then every rank keeps its part. Memory: one full parameter at a time. An adapter does not change the initial weights of
its base."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from xtuner_hydra.model.adapters import LORA_A, LORA_B

STD = 0.02
_BLOCK = 2**20


def initialise(model: nn.Module, seed: int, *, only: Container[str] | None = None) -> None:
    """Fill every parameter (`only`: those with these names): matrices and embedding N(0, 0.02), biases 0, norms 1; an adapter's A is normal with
    the standard deviation of peft's default, 1 / sqrt(3 in), its B is 0.

    Plain tensors or DTensors, not on the meta device."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, parameter in model.named_parameters():
            if only is not None and name not in only:
                continue
            tensor = parameter.detach()
            if tensor.ndim < 2:
                tensor.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            if name.endswith(LORA_B):
                tensor.zero_()
                continue
            std = (3 * tensor.shape[1]) ** -0.5 if name.endswith(LORA_A) else STD
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            in_place = local.shape == tensor.shape and local.device.type == "cpu" and local.dtype == torch.float32
            value = local if in_place else torch.empty(tensor.shape, dtype=torch.float32)
            blocks = value.view(-1).split(_BLOCK)
            list(pool.map(_fill, blocks, [f"{seed}/{name}/{number}" for number in range(len(blocks))], [std] * len(blocks)))
            if not in_place:
                assign(tensor, value)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy the full `value` (which every rank holds) into `parameter`, or the part of it that is this rank's."""
    if isinstance(parameter, DTensor):
        # every rank has the value: none needs to send it
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        parameter = parameter.to_local()
    parameter.copy_(value)


def _fill(block: Tensor, key: str, std: float) -> None:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    block.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
