"""How torch.distributed.checkpoint's shards are stored: as safetensors and JSON, where torch's own storage uses pickles.

    rank-R.safetensors   the shards that rank R wrote, each under "NAME:OFFSET"
    tensors.json         every tensor's dtype, shape and shards: offset, shape, file

Planning (who writes what, which shards a rank needs at another world size) is torch's. Only tensors are stored. torch's HuggingFaceStorageWriter
writes safetensors too, but no checksums, which the commit protocol wants (commit.py) and which would cost another reading of every file."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from xtuner_hydra.files import checksum, readable_by_others, sync, write_json

INDEX = "tensors.json"


class SafetensorsWriter(StorageWriter):
    """Writes this rank's shards into one file under `directory`. checksums: of that file, by its name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checksums: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all shards of `plan`, flushed to the disk."""
        if not plan.items:
            return _done([])
        tensors = _apart({_key(item.index): _tensor(item, planner) for item in plan.items})
        path = self.directory / f"rank-{dist.get_rank()}.safetensors"
        save_file(tensors, path)
        readable_by_others(path)
        sync(path)
        self.checksums[path.name] = checksum(path)
        return _done([WriteResult(item.index, tensors[_key(item.index)].nbytes, path.name) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the coordinating rank."""
        files = {result.index: result.storage_data for rank in results for result in rank}
        write_json(
            self.directory / INDEX,
            {name: _described(name, tensor, files) for name, tensor in metadata.state_dict_metadata.items()},  # type: ignore[arg-type]
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class SafetensorsReader(StorageReader):
    """Reads from the files under `directory` only what a rank needs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[MetadataIndex, str] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises ValueError if it is not valid."""
        metadata, self.files = {}, {}
        for name, tensor in json.loads((self.directory / INDEX).read_text(encoding="utf-8")).items():
            chunks = [ChunkStorageMetadata(torch.Size(shard["offset"]), torch.Size(shard["shape"])) for shard in tensor["shards"]]
            properties = TensorProperties(dtype=_dtype(tensor["dtype"]))
            metadata[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
            for shard in tensor["shards"]:
                if Path(shard["file"]).name != shard["file"]:
                    raise ValueError(f"{INDEX} names the file {shard['file']}, which is elsewhere")
                self.files[MetadataIndex(name, shard["offset"])] = shard["file"]
        return Metadata(metadata)  # type: ignore[arg-type]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what `plan` asks for into the planner's tensors."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.files[item.storage_index]].append(item)
        for file, items in by_file.items():
            with safe_open(self.directory / file, framework="pt") as stored:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_read(stored, item))
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _tensor(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    if item.type == WriteItemType.BYTE_IO:
        raise TypeError(f"{item.index.fqn} is not a tensor")
    value = planner.resolve_data(item)
    assert isinstance(value, torch.Tensor)
    return value.detach().cpu().contiguous()


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors`, copied where they share memory, as a tied weight's two names do: safetensors rejects those."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def _read(stored: Any, item: ReadItem) -> torch.Tensor:
    key = _key(item.storage_index)
    if not item.lengths:
        return stored.get_tensor(key)
    box = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
    return stored.get_slice(key)[box]


def _described(name: str, tensor: TensorStorageMetadata, files: dict[MetadataIndex, str]) -> dict[str, Any]:
    return {
        "dtype": str(tensor.properties.dtype).removeprefix("torch."),
        "shape": list(tensor.size),
        "shards": [
            {"offset": list(chunk.offsets), "shape": list(chunk.sizes), "file": files[MetadataIndex(name, chunk.offsets)]}
            for chunk in tensor.chunks
        ],
    }


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}:{','.join(map(str, index.offset or ()))}"


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{INDEX} names the dtype {name}, which torch does not know")
    return dtype


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
