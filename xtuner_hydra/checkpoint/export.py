"""Export to Hugging Face: safetensors (split above 5 GB, with an index), config.json, generation_config.json, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from xtuner_hydra.checkpoint.commit import commit
from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.files import sync_directory, umask, write_json
from xtuner_hydra.model.families import family_of, hf_config
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.runtime import DTYPES

SHARD_BYTES = 5 * 10**9  # transformers' own default limit


def export(
    directory: Path,
    step: int,
    model: CausalLM,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    keep: int,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Commit hf/step-N, loadable by `AutoModelForCausalLM.from_pretrained`, and point hf/latest at it. Collective.

    `dtype`: of the floating-point weights in the file, `float32` or `bfloat16` (or what `pretrained` had)."""

    def write(staging: Path) -> None:
        write_weights(staging, _full_tensors(model, _torch_dtype(dtype)), shard_bytes)
        if dist.get_rank() == 0:
            special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            write_json(staging / "config.json", hf_config(config, dtype, **special))
            write_json(staging / "generation_config.json", _generation(special, tokenizer.stop_token_ids))
            tokenizer.save(staging)

    path = commit(directory / f"step-{step}", write, keep=keep)
    if dist.get_rank() == 0:
        _point_latest(path)
    dist.barrier()
    return path


def _generation(special: dict[str, int | None], stops: tuple[int, ...]) -> dict[str, Any]:
    """generation_config.json: what is generated ends with the assistant's turn too, where EOS is another token."""
    if len(stops) < 2:
        return {**special, "_from_model_config": True}
    return {**special, "eos_token_id": list(stops)}


def write_weights(directory: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """Write named tensors (rank 0 does; the others take part in gathering them) into one file, or several with an index."""
    shard: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    index: dict[str, int] = {}
    total = size = 0
    for name, tensor in tensors:
        if dist.get_rank() != 0:
            continue
        if shard and size + tensor.nbytes > shard_bytes:
            files.append(_write_shard(directory, len(files), shard))
            shard, size = {}, 0
        shard[name] = tensor
        index[name] = len(files)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if dist.get_rank() == 0:
        files.append(_write_shard(directory, len(files), shard))
        _name_shards(files, index, total)


def _write_shard(directory: Path, number: int, tensors: dict[str, torch.Tensor]) -> Path:
    path = directory / f"shard-{number}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~umask())  # safetensors writes 0600, which would shut out a colleague who may read the directory
    return path


def _name_shards(files: list[Path], index: dict[str, int], total: int) -> None:
    """Give the shards their Hugging Face names, which hold their number, known only now."""
    if len(files) == 1:
        files[0].rename(files[0].with_name("model.safetensors"))
        return
    names = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(file.with_name(name))
    weight_map = {tensor: names[number] for tensor, number in index.items()}
    write_json(files[0].with_name("model.safetensors.index.json"), {"metadata": {"total_size": total}, "weight_map": weight_map})


def _full_tensors(model: CausalLM, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once (a tied head is its embedding), under its name in the files, gathered from all ranks, on the CPU in `dtype`. Collective."""
    pieces = family_of(model.config).pieces
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass alone, such as an evaluation's, leaves weights gathered and in the compute dtype
    for name, parameter in model.named_parameters():
        whole = parameter.detach().full_tensor().to("cpu", dtype)  # type: ignore[attr-defined]
        for piece, index in pieces(name, tuple(whole.shape)):
            yield piece, whole[index].contiguous()


def _torch_dtype(name: str) -> torch.dtype:
    return torch.float16 if name == "float16" else DTYPES[name]


def _point_latest(path: Path) -> None:
    """Switch hf/latest in one rename."""
    temporary = path.parent / ".latest.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, path.parent / "latest")
    sync_directory(path.parent)
