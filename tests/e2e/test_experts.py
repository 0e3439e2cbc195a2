"""A mixture of experts through the real command line: imported, trained, exported, resumed."""

import math

import pytest
from conftest import read_rows
from parity import EXPERTS, make_checkpoint, same_files

QUIET = ("debug=fast", "data.eval_path=null", "tracking.tensorboard=false", "tracking.wandb.enabled=false")


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint", "qwen3_moe", vocab_size=300)


def hf(directory):
    """The values of debug=fast would win over config.json's."""
    return [
        *QUIET,
        "model=hf",
        f"model.pretrained={directory}",
        "model.tokenizer=byte",
        *("model.vocab_size=300", "model.hidden_size=48", "model.intermediate_size=72", "model.num_hidden_layers=3"),
        *("model.num_attention_heads=6", "model.num_key_value_heads=2", "model.head_dim=10"),
    ]


def test_two_ranks_that_learn_nothing_export_what_they_started_from(cli, checkpoint):
    done = cli(
        *hf(checkpoint),
        *("optimizer.lr=0", "scheduler.lr_min=0", "checkpoint.interval=null", "hydra.run.dir=run"),
        *("parallelism.nproc_per_node=2", "trainer.global_batch_size=4"),
    )
    assert done.code == 0, done.text
    same_files(checkpoint, cli.directory / "run" / "hf" / "latest")
    rows = read_rows(cli.directory / "run")
    assert len(rows) == 2
    for row in rows:
        assert row["train/aux_loss"] >= EXPERTS["num_experts_per_tok"]  # what an even load has
        assert 1 <= row["router/max_load"] <= EXPERTS["num_experts"]
        assert 0 < row["router/entropy"] <= math.log(EXPERTS["num_experts"])


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(cli, checkpoint):
    common = [*hf(checkpoint), "trainer.total_steps=4", "checkpoint.interval=2", "checkpoint.hf_interval=-1"]
    assert cli(*common, "hydra.run.dir=whole").code == 0
    done = cli(*common, "hydra.run.dir=rest", "checkpoint.resume=whole/checkpoints/step-2")
    assert done.code == 0, done.text
    same_files(cli.directory / "whole" / "hf" / "latest", cli.directory / "rest" / "hf" / "latest")
    names = ("train/step", "train/loss", "train/aux_loss", "router/max_load", "train/grad_norm")
    whole, rest = ([[row[name] for name in names] for row in read_rows(cli.directory / run)] for run in ("whole", "rest"))
    assert rest == whole[2:]
