"""Combinations that cannot be trained are refused before anything is created."""

import pytest

from xtuner_hydra.app import App
from xtuner_hydra.config.checks import check, data_parallel_size, idle
from xtuner_hydra.errors import ConfigError


def config(*overrides):
    with App(overrides) as app:
        return app.compose(list(overrides)).config


@pytest.mark.parametrize(
    ("overrides", "ranks", "key"),
    [
        (["model.num_attention_heads=30"], 1, "model.num_attention_heads"),
        (["model.head_dim=63"], 1, "model.head_dim"),
        (["model=qwen3_moe_tiny", "model.moe.mlp_only_layers=[0,4]"], 1, "model.moe.mlp_only_layers"),
        (["model=qwen3_moe_tiny", "model.moe.decoder_sparse_step=5"], 1, "model.moe.decoder_sparse_step"),
        (["data.pack_max_length=50000"], 1, "data.pack_max_length"),
        (["trainer.global_batch_size=3"], 2, "trainer.global_batch_size"),
        ([], 2, "trainer.global_batch_size"),
        (["checkpoint.keep_best=eval/loss", "data.eval_path=null"], 1, "checkpoint.keep_best"),
        (["checkpoint.keep_best=eval/loss", "trainer.eval_interval=null"], 1, "checkpoint.keep_best"),
        (["checkpoint.keep_best=eval/loss", "checkpoint.interval=4"], 1, "checkpoint.keep_best"),
        (["checkpoint.keep_best=eval/loss", "checkpoint.interval=4", "trainer.eval_interval=6"], 1, "checkpoint.keep_best"),
        (["checkpoint.allow_change=[data,trainer.sed]"], 1, "checkpoint.allow_change"),
        (["parallelism.dp_shard=2", "trainer.global_batch_size=4"], 4, "parallelism.dp_shard"),
        (["parallelism.dp_replicate=3", "trainer.global_batch_size=4"], 4, "parallelism.dp_replicate"),
    ],
)
def test_impossible_combination_is_refused_by_its_key(overrides, ranks, key):
    with pytest.raises(ConfigError) as caught:
        check(config(*overrides), ranks)
    assert caught.value.key == key


@pytest.mark.parametrize(("saves", "evaluations"), [(4, 2), (4, 8), (-1, 3), ("null", 3)])
def test_the_best_can_be_kept_where_saves_and_evaluations_meet(saves, evaluations):
    check(config("checkpoint.keep_best=eval/loss", f"checkpoint.interval={saves}", f"trainer.eval_interval={evaluations}"), 1)


def test_fsdp_takes_one_pack_a_rank():
    chosen = config("parallelism=fsdp")
    check(chosen, 8)
    assert chosen.trainer.global_batch_size is None
    assert data_parallel_size(chosen, 8) == 8


@pytest.mark.parametrize(
    ("overrides", "idle_keys"),
    [
        ([], []),
        (["optimizer=sgd"], []),
        (["optimizer=sgd", "optimizer.eps=1e-6"], ["optimizer.eps"]),
        (["optimizer.momentum=0.5"], ["optimizer.momentum"]),
        (["optimizer=muon", "optimizer.momentum=0.5"], []),
        (["model.lora.rank=4"], ["model.lora.rank"]),
        (["model.adapter=lora", "model.lora.rank=4"], []),
        (["scheduler.decay_ratio=0.5"], ["scheduler.decay_ratio"]),
        (["scheduler=wsd", "scheduler.decay_ratio=0.5"], []),
        (["scheduler=constant", "scheduler.lr_min=1e-5"], ["scheduler.lr_min"]),
        (["scheduler.warmup_ratio=0.5", "scheduler.warmup_steps=1"], ["scheduler.warmup_ratio"]),
        (["scheduler.warmup_ratio=0.5"], []),
        (["checkpoint.hf_merge=true"], ["checkpoint.hf_merge"]),
        (["optimizer.max_nonfinite=3"], ["optimizer.max_nonfinite"]),
        (["optimizer.max_nonfinite=3", "optimizer.nonfinite=skip"], []),
        (["trainer.sample_tokens=9"], ["trainer.sample_tokens"]),
        (["data.eval_path=null", "trainer.eval_interval=1"], ["trainer.eval_interval"]),
        (["data.eval_path=null", "data.eval_ratio=0.1", "trainer.eval_interval=1"], []),
        (["scheduler.lr_min=1"], ["scheduler.lr_min"]),
    ],
)
def test_settings_that_nothing_reads_are_told(overrides, idle_keys):
    assert [sentence.partition("=")[0] for sentence in idle(config(*overrides))] == idle_keys
