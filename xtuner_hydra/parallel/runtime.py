"""What this process runs on: rank, device, process group, data-parallel mesh, compute dtype, threads, seeds.

A worker learns its rank from the variables that torch's elastic launcher sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT);
without them it is the only rank and needs no port."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xtuner_hydra.config.schema import Config, ParallelismConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.machine import cores, own_rank, started_by_torchrun
from xtuner_hydra.signals import handled_by

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Runtime:
    """This rank's place in the run. `mesh` has the dimension dp_shard, and before it dp_replicate where there are several copies."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh


def world_size(parallelism: ParallelismConfig, device: str) -> int:
    """Ranks that this config runs on: the outer torchrun's, or nproc_per_node (null = one per GPU)."""
    if started_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if parallelism.nproc_per_node is not None:
        return parallelism.nproc_per_node
    return max(1, torch.cuda.device_count()) if device_type(device) == "cuda" else 1


def ranks_here(ranks: int) -> int:
    """Those of `ranks` ranks that run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if started_by_torchrun() else ranks


def device_type(device: str) -> str:
    """`cpu` or `cuda` for trainer.device; raises ConfigError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device", device, "this machine has no GPU that torch can use; see python -m xtuner_hydra doctor")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def gpu_count(device: str) -> int:
    """GPUs that trainer.device allows here: 0 on a CPU."""
    return torch.cuda.device_count() if device_type(device) == "cuda" else 0


def refuse_missing_gpus(device: str, ranks: int) -> None:
    """ConfigError if there are fewer GPUs here than ranks on this machine."""
    if device_type(device) == "cuda" and ranks_here(ranks) > (gpus := gpu_count(device)):
        raise ConfigError("parallelism.nproc_per_node", ranks_here(ranks), f"each rank needs its own GPU, and torch sees {gpus} here")


def param_dtype(name: str, device: str) -> str:
    """`bfloat16` or `float32` for parallelism.param_dtype; `auto` is bfloat16 if the device has instructions to multiply it."""
    if name != "auto":
        return name
    if device_type(device) == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"


@contextmanager
def runtime(config: Config) -> Iterator[Runtime]:
    """Join the process group, and leave it at the end.

    If an error ends the block and there are other ranks, the group ends only with the process: NCCL shuts it down only together with the
    others, which may be waiting for this one, and the error must be reported first."""
    kind = device_type(config.trainer.device)
    rank, local_rank = own_rank(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    _share_cores()
    _seed(config, rank)
    # gloo beside NCCL: checkpoints and small agreements travel between CPUs
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    # While it waits in C++ for the others, a signal ends the process at once: a Python handler would not run there, and if another rank has
    # already obeyed the signal, the wait is long.
    with handled_by(signal.SIG_DFL) if started_by_torchrun() else nullcontext():
        dist.init_process_group(backend, timeout=patience(config.parallelism), **_rendezvous())
    world, failed = dist.get_world_size(), True
    try:
        yield Runtime(rank, world, device, _mesh(kind, world, config.parallelism))
        failed = False
    finally:
        if world == 1 or not failed:
            dist.destroy_process_group()


def _mesh(kind: str, world: int, parallelism: ParallelismConfig) -> DeviceMesh:
    copies = parallelism.dp_replicate
    if copies > 1:
        mesh = init_device_mesh(kind, (copies, world // copies), mesh_dim_names=("dp_replicate", "dp_shard"))
    else:  # on a mesh of two dimensions FSDP would sum over the one copy too
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("dp_shard",))
    for group in mesh.get_all_groups():  # groups made by the mesh have torch's timeout
        dist.distributed_c10d._set_pg_timeout(patience(parallelism), group)
    return mesh


def patience(parallelism: ParallelismConfig) -> timedelta:
    """How long a collective operation may take: longer than the watchdog, which knows which rank is late and not only that one is."""
    return timedelta(seconds=1.5 * parallelism.timeout + 60)


def _rendezvous() -> dict[str, Any]:
    if not started_by_torchrun():
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # torchrun's store may outlive a crash of the ranks, with the addresses of dead ones in it: each attempt has its own keys
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return {"store": store, "rank": rank, "world_size": world_size}


def _share_cores() -> None:
    """Ranks on one machine share its cores, unless OMP_NUM_THREADS says otherwise."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "OMP_NUM_THREADS" not in os.environ and ranks_here > 1:
        torch.set_num_threads(max(1, cores() // ranks_here))


def _seed(config: Config, rank: int) -> None:
    seed = config.trainer.seed + rank  # dropout differs between ranks
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
        torch.use_deterministic_algorithms(True)
