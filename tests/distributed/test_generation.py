"""The ranks of a sharded model give one answer, that of the whole model, and leave the parameters sharded."""

import pytest
import torch
from parity import CASES, document, make_checkpoint, ours
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from xtuner_hydra.build import build_engine
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.model.generation import generate, greedy
from xtuner_hydra.parallel.runtime import runtime

PROMPT = document(20, 1).tolist()


def answer(directory, reshard):
    config = Config(
        model=ModelConfig(**read_hf_config(directory), pretrained=str(directory)),
        data=DataConfig(path="unused"),
        parallelism=ParallelismConfig(param_dtype="float32", reshard_after_forward=reshard, recompute_ratio=0.5),
        trainer=TrainerConfig(device="cpu"),
    )
    with runtime(config) as place:
        engine = build_engine(config, place)
        before = torch.get_rng_state()
        ids = engine.answer(PROMPT, 20, ())
        assert torch.equal(torch.get_rng_state(), before)
        assert all(isinstance(parameter, DTensor) for parameter in engine.model.parameters())
    return ids


@pytest.mark.parametrize(("case", "reshard"), [("smollm2", False), ("qwen3_moe", True)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_gives_the_answer_of_the_whole_model(tmp_path, case, reshard, ranks):
    assert case in CASES
    directory = make_checkpoint(tmp_path, case)
    expected = list(generate(ours(directory), PROMPT, most=20, stop=(), choose=greedy))
    assert len(set(expected)) > 3
    assert run_on_ranks(answer, ranks, directory, reshard) == [expected] * ranks
