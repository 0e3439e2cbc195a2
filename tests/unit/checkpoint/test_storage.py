"""Sharded tensors as safetensors and JSON: the same bits come back, at any number of ranks, and what is no index of ours is refused."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_on_ranks
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from xtuner_hydra.checkpoint.storage import INDEX, SafetensorsReader, SafetensorsWriter

SIZES = (1, 2, 4)


def values():
    """What is stored, whole: uneven in every dimension that is sharded, one with fewer rows than there are ranks."""
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(7, 5),
        "columns": torch.randn(3, 9),
        "short": torch.randn(3),
        "half": torch.randn(5, 2, 3).bfloat16(),
        "whole": torch.arange(6) - 3,
        "plain": torch.tensor(12.0, dtype=torch.float64),
    }


PLACES = {"matrix": Shard(0), "columns": Shard(1), "short": Shard(0), "half": Shard(0), "whole": Replicate()}


def laid_out(whole, mesh):
    """`whole` over the ranks of `mesh`; `tied` is `matrix` under another name."""
    tensors = {name: distribute_tensor(value, mesh, [PLACES[name]]) if name in PLACES else value for name, value in whole.items()}
    return tensors | {"tied": tensors["matrix"]}


def round_trips_on_a_rank(directory):
    """Write with the first 1, 2 and 4 ranks, and read each with the first 1, 2 and 4."""
    dist.init_process_group("gloo")
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    mine = {size: group for size, group in groups.items() if dist.get_rank() < size}
    meshes = {size: DeviceMesh.from_group(group, "cpu") for size, group in mine.items()}
    for size, group in mine.items():
        (directory / str(size)).mkdir(exist_ok=True)
        dist.barrier(group)
        dcp.save(laid_out(values(), meshes[size]), storage_writer=SafetensorsWriter(directory / str(size)), process_group=group)
    dist.barrier()
    differing = []
    for written in SIZES:
        for size, group in mine.items():
            empty = {name: torch.full_like(value, -1) for name, value in values().items()}
            found = laid_out(empty, meshes[size])
            dcp.load(found, storage_reader=SafetensorsReader(directory / str(written)), process_group=group)
            for name, value in (values() | {"tied": values()["matrix"]}).items():
                now = found[name].full_tensor() if name != "plain" else found[name]
                if now.dtype != value.dtype or not torch.equal(now, value):
                    differing.append((written, size, name))
    return differing


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Directories by number of ranks, and what came back wrong."""
    directory = tmp_path_factory.mktemp("stored")
    return directory, run_on_ranks(round_trips_on_a_rank, max(SIZES), directory)


def test_every_bit_comes_back_at_any_number_of_ranks(written):
    assert written[1] == [[], [], [], []]


@pytest.mark.parametrize("size", SIZES)
def test_anyone_with_safetensors_can_put_the_tensors_together(written, size):
    directory = written[0] / str(size)
    assert {path.name for path in directory.iterdir()} == {INDEX, *(f"rank-{rank}.safetensors" for rank in range(size))}
    for name, tensor in json.loads((directory / INDEX).read_text()).items():
        expected = values()["matrix" if name == "tied" else name]
        whole = torch.full(tensor["shape"], -1, dtype=getattr(torch, tensor["dtype"]))
        for shard in tensor["shards"]:
            box = tuple(slice(start, start + length) for start, length in zip(shard["offset"], shard["shape"], strict=True))
            with safe_open(directory / shard["file"], framework="pt") as file:
                whole[box] = file.get_tensor(f"{name}:{','.join(map(str, shard['offset']))}")
        assert whole.dtype == expected.dtype
        assert torch.equal(whole, expected), name


@pytest.fixture
def stored(tmp_path):
    """A directory that this process has written, and a function to change its index."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dcp.save({"a": torch.arange(4.0), "b": torch.ones(2)}, storage_writer=SafetensorsWriter(tmp_path))

    def change(alter):
        index = json.loads((tmp_path / INDEX).read_text())
        alter(index)
        (tmp_path / INDEX).write_text(json.dumps(index))

    yield tmp_path, change
    dist.destroy_process_group()


@pytest.mark.parametrize("file", ["/etc/hostname", "../rank-0.safetensors", "sub/rank-0.safetensors"])
def test_an_index_that_names_a_file_elsewhere_is_refused(stored, file):
    directory, change = stored
    change(lambda index: index["b"]["shards"][0].update(file=file))
    with pytest.raises(ValueError, match="is elsewhere"):
        SafetensorsReader(directory).read_metadata()


@pytest.mark.parametrize("dtype", ["float31", "nn", "load", "__name__", ""])
def test_an_index_that_names_an_unknown_dtype_is_refused(stored, dtype):
    directory, change = stored
    change(lambda index: index["a"].update(dtype=dtype))
    with pytest.raises(ValueError, match=rf"names the dtype {dtype}, which torch does not know"):
        SafetensorsReader(directory).read_metadata()


def test_what_is_not_stored_is_not_made_up(stored):
    with pytest.raises(dcp.CheckpointException, match="c"):
        dcp.load({"a": torch.zeros(4), "c": torch.zeros(1)}, storage_reader=SafetensorsReader(stored[0]))


def test_another_shape_is_refused(stored):
    with pytest.raises(dcp.CheckpointException, match=r"(?i)size mismatch"):
        dcp.load({"a": torch.zeros(5)}, storage_reader=SafetensorsReader(stored[0]))


def test_what_is_no_tensor_is_not_stored(stored, tmp_path):
    """DCP would pickle it."""
    with pytest.raises(dcp.CheckpointException, match="a is not a tensor"):
        dcp.save({"a": {1, 2}}, storage_writer=SafetensorsWriter(tmp_path))


def test_it_is_read_in_another_dtype_where_that_is_asked_for(stored):
    target = {"a": torch.zeros(4, dtype=torch.bfloat16)}
    dcp.load(target, storage_reader=SafetensorsReader(stored[0]))
    assert torch.equal(target["a"], torch.arange(4, dtype=torch.bfloat16))
