"""Export to Hugging Face: safetensors (split above 5 GB, with an index), config.json, generation_config.json, tokenizer; or to peft: an
adapter with its adapter_config.json, beside the tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from xtuner_hydra.checkpoint.commit import MANIFEST, commit, has_step_name, leftovers, on_first_rank, put_back, remove, step_of
from xtuner_hydra.checkpoint.retention import surplus
from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.files import readable_by_others, sync, write_json
from xtuner_hydra.model.adapters import ALL, adapted_names, is_adapter, merged, target_names, whole
from xtuner_hydra.model.families import family_of, hf_config
from xtuner_hydra.model.hub import published_name
from xtuner_hydra.model.pretrained import pretrained_dtype, stored_dtypes
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.sharding import reshard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that weights can be exported in."""
SHARD_BYTES = 5 * 10**9  # transformers' own default limit


def export(
    directory: Path,
    step: int,
    model: CausalLM,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    keep: int,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Commit hf/step-N, loadable by `AutoModelForCausalLM.from_pretrained`, and point hf/latest at it. Collective. An adapter is added to
    the weights of its base, in fp32 before they are rounded.

    `dtype`: of the weights in the files, `float32`, `bfloat16` or `float16`; None: each as in `config.pretrained`, fp32 without one."""
    return _publish(export_to(directory / f"step-{step}", model, config, tokenizer, dtype=dtype, shard_bytes=shard_bytes), keep)


def export_adapter(directory: Path, step: int, model: CausalLM, config: ModelConfig, tokenizer: Tokenizer, *, keep: int) -> Path:
    """Commit hf/step-N with the adapter alone, and point hf/latest at it. Collective."""
    return _publish(export_adapter_to(directory / f"step-{step}", model, config, tokenizer), keep)


def export_adapter_to(directory: Path, model: CausalLM, config: ModelConfig, tokenizer: Tokenizer) -> Path:
    """Commit `directory` with the adapter alone in fp32, loadable by `PeftModel.from_pretrained` beside its base, `config.pretrained`. Collective."""

    def write(staging: Path) -> None:
        tensors = {f"base_model.model.{name}": whole(value).cpu() for name, value in model.named_parameters() if is_adapter(name)}
        if dist.get_rank() == 0:
            _save(staging / "adapter_model.safetensors", tensors)
            write_json(staging / "adapter_config.json", peft_config(model, config))
            tokenizer.save(staging)

    return commit(directory, write)


def peft_config(model: CausalLM, config: ModelConfig) -> dict[str, Any]:
    """adapter_config.json of peft's LoraConfig. `all-linear` is written as the names that it stands for."""
    assert config.pretrained is not None
    base, revision = published_name(config.pretrained)
    targets = [target for target in target_names(config.lora) if target != ALL]
    if len(targets) < len(target_names(config.lora)):
        targets += [name.rpartition(".")[2] for name in adapted_names(model)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": sorted(set(targets)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def finish(path: Path, keep: int) -> None:
    """Finish what a crash may have left undone after the export `path` was committed, unless there is a later one. Collective."""

    def act() -> None:
        latest = (path.parent / "latest").resolve()
        if not (latest.is_dir() and has_step_name(latest) and step_of(latest) > step_of(path)):
            _show(path, keep)

    on_first_rank(act, path)


def _publish(path: Path, keep: int) -> Path:
    on_first_rank(lambda: _show(path, keep), path)
    return path


def _show(path: Path, keep: int) -> None:
    """Point hf/latest at a committed export, and only then remove older ones and the remains of interrupted exports."""
    point_latest(path)
    put_back(path.parent)
    for left in leftovers(path.parent):
        shutil.rmtree(left)
    for old in surplus(path.parent, keep, just_saved=path):
        remove(old)


def export_to(
    directory: Path,
    model: CausalLM,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Commit `directory` itself as an export. Collective."""

    def write(staging: Path) -> None:
        write_weights(staging, _full_tensors(model, _dtypes(config, dtype)), shard_bytes)
        if dist.get_rank() == 0:
            special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            write_json(staging / "config.json", hf_config(config, dtype or exported_dtype(config), **special))
            write_json(staging / "generation_config.json", _generation(config, special, tokenizer.stop_token_ids))
            tokenizer.save(staging)

    return commit(directory, write)


def _generation(config: ModelConfig, special: dict[str, int | None], stops: tuple[int, ...]) -> dict[str, Any]:
    """generation_config.json: the pretrained model's own, with this tokenizer's ids where it has some. Generation stops at the end of the
    assistant's turn too, if that is another token than EOS, and wherever the pretrained model's stops."""
    own = _pretrained(config, "generation_config.json")
    theirs = (_pretrained(config, "config.json") or {} if own is None else own).get("eos_token_id")
    ends = list(dict.fromkeys([*stops, *(theirs if isinstance(theirs, list) else [] if theirs is None else [theirs])]))
    if own is None:
        return {**special, "eos_token_id": ends} if len(ends) > 1 else {**special, "_from_model_config": True}
    known = {name: number for name, number in special.items() if number is not None}
    return own | known | ({"eos_token_id": ends} if len(ends) > 1 else {})


def _pretrained(config: ModelConfig, file: str) -> dict[str, Any] | None:
    """What `file` in the weights' directory holds, if it has the ids of the tokenizer there; None if it is missing or cannot be read."""
    if config.pretrained is None or config.tokenizer not in (None, config.pretrained):
        return None
    try:
        return dict(json.loads((Path(config.pretrained) / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_weights(directory: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """Write named tensors (rank 0 does; the others take part in gathering them) into one file, or several with an index."""
    if dist.get_rank() != 0:
        for _ in tensors:
            pass
        return
    try:
        _write_shards(directory, tensors, shard_bytes)
    finally:
        for _ in tensors:  # a full disk must not leave the other ranks waiting for this one
            pass


def _write_shards(directory: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    shard: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    index: dict[str, int] = {}
    total = size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            files.append(_write_shard(directory, len(files), shard))
            shard, size = {}, 0
        shard[name] = tensor
        index[name] = len(files)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    files.append(_write_shard(directory, len(files), shard))
    _name_shards(files, index, total)


def _write_shard(directory: Path, number: int, tensors: dict[str, torch.Tensor]) -> Path:
    path = directory / f"shard-{number}.safetensors"
    _save(path, tensors)
    return path


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    readable_by_others(path)


def _name_shards(files: list[Path], index: dict[str, int], total: int) -> None:
    """Give the shards their Hugging Face names, which contain how many there are, known only now."""
    if len(files) == 1:
        files[0].rename(files[0].with_name("model.safetensors"))
        return
    names = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(file.with_name(name))
    weight_map = {tensor: names[number] for tensor, number in index.items()}
    write_json(files[0].with_name("model.safetensors.index.json"), {"metadata": {"total_size": total}, "weight_map": weight_map})


def exported_dtype(config: ModelConfig) -> str:
    """The dtype of (most of) the weights if none is named for the export: that of `pretrained`, fp32 for random weights."""
    return pretrained_dtype(config.pretrained) if config.pretrained else "float32"


def _dtypes(config: ModelConfig, dtype: str | None) -> Callable[[str], torch.dtype]:
    """The dtype of a tensor by its name in the files."""
    usual = DTYPES[dtype or exported_dtype(config)]
    stored = stored_dtypes(config.pretrained) if config.pretrained and dtype is None else {}
    return lambda name: stored.get(name, usual)


def _full_tensors(model: CausalLM, dtype_of: Callable[[str], torch.dtype]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight once (a tied head is its embedding), under its name in the files, gathered from all ranks, on the CPU. Collective."""
    pieces = family_of(model.config).pieces
    reshard(model)  # a forward pass alone leaves weights gathered and in the compute dtype
    for name, value in merged(model):
        for piece, index in pieces(name, tuple(value.shape)):
            yield piece, _cast(piece, value[index].cpu(), dtype_of(piece)).contiguous()


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` in `dtype`. Raises RefusedError where a number that is finite would become infinite."""
    cast = value.to(dtype)
    if dtype == torch.float16 and bool((cast.isinf() & value.isfinite()).any()):
        raise RefusedError(f"{name} has values beyond float16's greatest, {torch.finfo(dtype).max:g}; export it in bfloat16 or float32")
    return cast


def point_latest(path: Path) -> None:
    """Switch hf/latest to the export `path` in one rename."""
    temporary = path.parent / ".latest.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    latest = path.parent / "latest"
    if (latest / MANIFEST).is_file() and not latest.is_symlink():
        shutil.rmtree(latest)  # a copy of an export, by a tool that follows links
    os.replace(temporary, latest)
    sync(path.parent)
