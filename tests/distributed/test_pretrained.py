"""Weights on 2 gloo ranks: each reads the half that it keeps, and the export is the checkpoint, bit for bit."""

from pathlib import Path

import pytest
from parity import make_checkpoint, same_files, tensors
from ranks import run_on_ranks
from safetensors import safe_open

from xtuner_hydra.build import build_engine
from xtuner_hydra.checkpoint.export import export
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.model import pretrained
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.parallel.runtime import runtime

MIXED = ["llama 3.2", "qwen2", "qwen3 tied, biased", "qwen3_moe mixed"]


class Counting:
    """safe_open that counts the bytes of what is read through it."""

    read = 0

    def __init__(self, *args, **kwargs):
        self.inner = safe_open(*args, **kwargs)

    def __enter__(self):
        self.inner.__enter__()
        return self

    def __exit__(self, *error):
        return self.inner.__exit__(*error)

    def keys(self):
        return self.inner.keys()

    def get_slice(self, name):
        return CountingSlice(self.inner.get_slice(name))


class CountingSlice:
    def __init__(self, inner):
        self.inner = inner

    def get_shape(self):
        return self.inner.get_shape()

    def get_dtype(self):
        return self.inner.get_dtype()

    def __getitem__(self, index):
        tensor = self.inner[index]
        Counting.read += tensor.nbytes
        return tensor


def load_and_export(parent):
    """On each rank: case -> bytes read to build the engine. The exports stand beside the checkpoints."""
    pretrained.safe_open = Counting
    read = {}
    config = Config(
        data=DataConfig(path="unused"), parallelism=ParallelismConfig(param_dtype="float32"), trainer=TrainerConfig(device="cpu")
    )
    with runtime(config) as place:
        for case in MIXED:
            config.model = ModelConfig(**read_hf_config(parent / case), pretrained=str(parent / case))
            Counting.read = 0
            model = build_engine(config, place).model
            read[case] = Counting.read
            export(parent / f"{case} exported", 1, model, config.model, ByteTokenizer(), dtype="float32", keep=1, shard_bytes=20_000)
    return read


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    parent = tmp_path_factory.mktemp("pretrained")
    for case in MIXED:
        make_checkpoint(parent / case, case)
    return parent, run_on_ranks(load_and_export, 2, parent)


@pytest.mark.parametrize("case", MIXED)
def test_a_rank_reads_what_it_keeps(loaded, case):
    parent, by_rank = loaded
    total = sum(tensor.nbytes for tensor in tensors(parent / case).values())
    read = [rank[case] for rank in by_rank]
    assert sum(read) == total  # nothing twice
    assert max(read) < 0.55 * total


@pytest.mark.parametrize("case", MIXED)
def test_two_ranks_export_what_they_imported(loaded, case):
    parent, _ = loaded
    after = Path(parent / f"{case} exported" / "latest")
    assert len(list(after.glob("*.safetensors"))) > 1
    same_files(parent / case, after)
