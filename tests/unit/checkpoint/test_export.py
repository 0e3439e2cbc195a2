"""What is exported, transformers loads: the same logits, dtype and tokenizer, from one rank or two."""

import json
import shutil
import stat
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import transformers
from parity import same_files
from ranks import run_on_ranks
from safetensors import safe_open

from xtuner_hydra.build import build_engine
from xtuner_hydra.checkpoint.export import _generation, export, finish, point_latest
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import SaveError
from xtuner_hydra.files import umask
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.pretrained import load_pretrained, pretrained_dtype
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.runtime import runtime

SHAPE = {
    "vocab_size": 261,  # odd: two ranks' parts differ in size
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rope_theta": 5e4,
    "max_position_embeddings": 512,
}
TIES = {"untied": {}, "tied": {"tie_word_embeddings": True}}
SEED = 11
IDS = torch.arange(7, 47)


def config_of(changes):
    return Config(
        model=ModelConfig(**SHAPE | changes),
        data=DataConfig(path="unused"),
        parallelism=ParallelismConfig(param_dtype="float32"),
        trainer=TrainerConfig(seed=SEED, device="cpu"),
    )


def write(directory, changes, place=None, steps=(3,), dtype="float32", keep=1, shard_bytes=20_000):
    """Export a new model, once for each of `steps`, on the ranks of `place` (None: this process alone)."""
    config = config_of(changes)
    with runtime(config) if place is None else nullcontext(place) as here:
        model = build_engine(config, here).model
        for step in steps:
            export(directory, step, model, config.model, ByteTokenizer(), dtype=dtype, keep=keep, shard_bytes=shard_bytes)
            assert (directory / "latest").resolve() == directory / f"step-{step}"


def expected_logits(changes):
    """Of the model before it was sharded and written."""
    model = CausalLM(ModelConfig(**SHAPE | changes))
    initialise(model, SEED)
    with torch.no_grad():
        return model(IDS, torch.arange(len(IDS)), torch.tensor([0, len(IDS)], dtype=torch.int32), len(IDS))


def write_both(directory):
    with runtime(config_of({})) as place:
        for name, changes in TIES.items():
            write(directory / name, changes, place)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    if request.param == 1:
        write_both(directory)
    else:
        run_on_ranks(write_both, request.param, directory)
    return directory


@pytest.mark.parametrize("tie", TIES)
def test_transformers_loads_several_files_with_equal_logits(exported, tie):
    directory, changes = exported / tie / "latest", TIES[tie]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert ("lm_head.weight" in index["weight_map"]) != (tie == "tied")

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[None]).logits[0], expected_logits(changes), atol=1e-5, rtol=1e-5)


def test_every_shard_is_within_the_limit_and_the_index_adds_up(tmp_path):
    write(tmp_path, {}, shard_bytes=20_000)
    directory = tmp_path / "step-3"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            sizes = {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118 - not a mapping
        assert sum(sizes.values()) <= 20_000 or len(sizes) == 1
        assert {index["weight_map"][name] for name in sizes} == {path.name}
        total += sum(sizes.values())
    assert index["metadata"]["total_size"] == total == 4 * sum(p.numel() for p in CausalLM(ModelConfig(**SHAPE)).parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_the_dtype_in_the_file(tmp_path, dtype):
    write(tmp_path, {}, dtype=dtype, shard_bytes=10**9)
    directory = tmp_path / "latest"
    assert [path.name for path in directory.glob("model*")] == ["model.safetensors"]
    assert transformers.AutoModelForCausalLM.from_pretrained(directory).dtype == getattr(torch, dtype)
    assert pretrained_dtype(directory) == dtype
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    exact = CausalLM(ModelConfig(**SHAPE))
    initialise(exact, SEED)
    again = CausalLM(ModelConfig(**SHAPE))
    load_pretrained(again, directory)
    for (name, ours), parameter in zip(exact.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.to(getattr(torch, dtype)).float(), parameter), name


@pytest.mark.parametrize("tie", TIES)
def test_after_an_evaluation_the_weights_are_those_of_training(tmp_path, tie):
    config = config_of(TIES[tie])
    config.parallelism = ParallelismConfig(param_dtype="bfloat16", reshard_after_forward=False)
    with runtime(config) as place:
        model = build_engine(config, place).model
        for name in ("before", "after"):
            export(tmp_path / name, 3, model, config.model, ByteTokenizer(), dtype="float32", keep=1)
            with torch.no_grad():  # leaves weights gathered, in bfloat16
                model(IDS, torch.arange(len(IDS)), torch.tensor([0, len(IDS)], dtype=torch.int32), len(IDS))
    same_files(tmp_path / "before" / "latest", tmp_path / "after" / "latest")


def test_the_config_says_what_was_trained(tmp_path):
    """Both to transformers and to model=hf."""
    changes = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    write(tmp_path, changes)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "latest")
    for name, value in (SHAPE | changes).items():
        found = theirs.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(theirs, name)
        assert found == value, name
    assert ModelConfig(**read_hf_config(tmp_path / "latest")) == ModelConfig(**SHAPE | changes)


def test_the_tokenizer_comes_along(tmp_path):
    write(tmp_path, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "latest")
    assert tokenizer("é<|im_end|>")["input_ids"] == [*"é".encode(), ByteTokenizer.eos_token_id]
    assert tokenizer.eos_token_id == transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "latest").generation_config.eos_token_id


@pytest.mark.parametrize(("keep", "expected"), [(1, ["step-10"]), (2, ["step-10", "step-9"])])
def test_latest_points_at_the_newest_of_those_that_stay(tmp_path, keep, expected):
    write(tmp_path, {}, steps=(2, 9, 10), keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *expected]
    assert (tmp_path / "latest").readlink().name == "step-10"  # relative: the run directory can be moved


def test_latest_is_the_export_just_made_where_an_earlier_run_went_further(tmp_path):
    write(tmp_path, {}, steps=(16, 12))
    assert (tmp_path / "latest" / "config.json").exists()


def test_what_a_crash_left_undone_after_the_commit_is_finished(tmp_path):
    place = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    write(tmp_path, {}, steps=(2, 9), keep=2)
    point_latest(tmp_path / "step-2")  # as if the process had been killed before it pointed at step-9 and removed step-2
    dist.init_process_group("gloo", **place)
    try:
        finish(tmp_path / "step-9", keep=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-9"]
        assert (tmp_path / "latest").readlink().name == "step-9"
        (tmp_path / "latest").unlink()
        finish(tmp_path / "step-9", keep=1)
        assert (tmp_path / "latest" / "config.json").exists()
    finally:
        dist.destroy_process_group()


def test_what_interrupted_exports_have_left_goes_with_the_next_one(tmp_path):
    for name in (".step-3.tmp", ".step-2.old", ".step-5.replaced"):
        (tmp_path / name).mkdir()
    write(tmp_path, {}, steps=(9,), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert (tmp_path / "latest").readlink().name == "step-9"


def test_latest_that_a_copying_tool_has_made_a_directory_is_replaced(tmp_path):
    write(tmp_path, {}, steps=(2,))
    (tmp_path / "latest").unlink()
    shutil.copytree(tmp_path / "step-2", tmp_path / "latest")
    write(tmp_path, {}, steps=(9,))
    assert (tmp_path / "latest").readlink().name == "step-9"


def test_others_may_read_what_they_may_read_elsewhere(tmp_path):
    write(tmp_path, {})
    for path in (tmp_path / "latest").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask(), path.name


def test_the_base_models_way_of_generating_comes_along(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = config_of({}).model
    config.pretrained, special = str(base), {"bos_token_id": 1, "eos_token_id": 2}
    assert _generation(config, special, (2,)) == {"_from_model_config": True, **special}
    (base / "config.json").write_text('{"eos_token_id": [2, 6]}')
    assert _generation(config, special, (2, 3)) == {**special, "eos_token_id": [2, 3, 6]}
    (base / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true, "eos_token_id": 7}')
    assert _generation(config, special, (2,)) == {"temperature": 0.3, "do_sample": True, **special, "eos_token_id": [2, 7]}
    assert _generation(config, special, (2, 3))["eos_token_id"] == [2, 3, 7]
    (base / "generation_config.json").write_text('{"bos_token_id": 5, "eos_token_id": [2, 9]}')
    assert _generation(config, {"bos_token_id": None, "eos_token_id": 2}, (2,)) == {"bos_token_id": 5, "eos_token_id": [2, 9]}
    config.tokenizer = "byte"  # its ids are others
    assert "temperature" not in _generation(config, special, (2,))


def test_a_number_too_great_for_float16_is_not_written_as_infinity(tmp_path):
    config = config_of({})
    with runtime(config) as place:
        model = build_engine(config, place).model
        with torch.no_grad():
            model.get_parameter("model.norm.weight").to_local()[0] = 70_000
        with pytest.raises(SaveError, match=r"model\.norm\.weight has values beyond float16's greatest, 65504"):
            export(tmp_path, 1, model, config.model, ByteTokenizer(), dtype="float16", keep=1)
    assert not list(tmp_path.glob("step-*"))
