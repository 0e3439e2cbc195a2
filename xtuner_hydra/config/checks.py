"""Checks that need two groups or the number of ranks. They run before anything is created; each names the key to change."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from xtuner_hydra.config.schema import Config
from xtuner_hydra.config.strict import did_you_mean, known_keys
from xtuner_hydra.errors import ConfigError


def check(config: Config, world_size: int) -> None:
    """Raise ConfigError for a combination that cannot be trained on `world_size` ranks."""
    _check_heads(config)
    _check_experts(config)
    _check_adapter(config)
    _check_best(config)
    _check_allowed(config)
    _check_ranks(config, world_size)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that work on different packs: dp_replicate x dp_shard, here always the whole world."""
    parallelism = config.parallelism
    shard = world_size // parallelism.dp_replicate if parallelism.dp_shard == -1 else parallelism.dp_shard
    return parallelism.dp_replicate * shard


def _check_heads(config: Config) -> None:
    model = config.model
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(
            "model.num_attention_heads",
            model.num_attention_heads,
            f"not divisible by model.num_key_value_heads={model.num_key_value_heads}; every key-value head serves equally many query heads",
        )
    if model.head_dim % 2:
        raise ConfigError("model.head_dim", model.head_dim, "must be even; rotary embeddings turn pairs of numbers")
    if config.data.pack_max_length > model.max_position_embeddings:
        raise ConfigError(
            "data.pack_max_length",
            config.data.pack_max_length,
            f"longer than model.max_position_embeddings={model.max_position_embeddings}; lower it, or raise that",
        )


def _check_experts(config: Config) -> None:
    model = config.model
    if model.moe is None:
        return
    if strangers := [layer for layer in model.moe.mlp_only_layers if not 0 <= layer < model.num_hidden_layers]:
        raise ConfigError(
            "model.moe.mlp_only_layers",
            model.moe.mlp_only_layers,
            f"there is no layer {strangers[0]}; layers go from 0 to {model.num_hidden_layers - 1}",
        )
    if not any(map(model.has_experts, range(model.num_hidden_layers))):
        raise ConfigError(
            "model.moe.decoder_sparse_step", model.moe.decoder_sparse_step, "no layer has experts; lower it, or set model.moe=null"
        )


def _check_adapter(config: Config) -> None:
    if config.exports_adapter and not config.model.has_base and config.checkpoint.hf_interval is not None:
        raise ConfigError(
            "checkpoint.hf_merge",
            "false",
            "the adapter's base is not (all) in model.pretrained but starts from random weights, which the adapter alone does not hold; "
            "set it to true or null, or checkpoint.hf_interval=null to export nothing",
        )


def _check_best(config: Config) -> None:
    best, saves, evaluations = config.checkpoint.keep_best, config.checkpoint.interval, config.trainer.eval_interval
    if best is None:
        return
    if evaluations is None or (config.data.eval_path is None and config.data.eval_ratio is None):
        key = "trainer.eval_interval" if evaluations is None else "data.eval_path"
        raise ConfigError("checkpoint.keep_best", best, f"nothing is evaluated; set {key}, or leave this null")
    if saves is not None and saves > 0 and (evaluations < 0 or (saves % evaluations and evaluations % saves)):
        raise ConfigError(
            "checkpoint.keep_best",
            best,
            f"checkpoint.interval={saves} and trainer.eval_interval={evaluations} hardly ever meet, and only a checkpoint whose step is evaluated "
            "can be the best; make one a multiple of the other",
        )


def _check_allowed(config: Config) -> None:
    known = [*known_keys()]
    for key in config.checkpoint.allow_change:
        if key not in known:
            raise ConfigError("checkpoint.allow_change", key, f"there is no such key or group of keys.{did_you_mean(key, known)}")


def _check_ranks(config: Config, world_size: int) -> None:
    parallelism, batch = config.parallelism, config.trainer.global_batch_size
    dp_size = data_parallel_size(config, world_size)
    if dp_size != world_size:
        raise ConfigError(
            "parallelism.dp_shard" if parallelism.dp_shard != -1 else "parallelism.dp_replicate",
            parallelism.dp_shard if parallelism.dp_shard != -1 else parallelism.dp_replicate,
            f"dp_replicate x dp_shard must be the number of ranks, {world_size}"
            " (parallelism.nproc_per_node, or what torchrun starts); dp_shard=-1 takes what is left",
        )
    if batch is not None and batch % dp_size:
        raise ConfigError(
            "trainer.global_batch_size",
            batch,
            f"not divisible by the {dp_size} data-parallel ranks; take a multiple of {dp_size}, or null for one pack per rank (as with "
            "parallelism=fsdp)",
        )


def idle(config: Config) -> list[str]:
    """Settings that somebody has changed and that nothing reads, a sentence each. They are not errors: a sweep may change both sides."""
    model, optimizer, scheduler, trainer = config.model, config.optimizer, config.scheduler, config.trainer
    rules: list[tuple[bool, str, Any, tuple[str, ...], str]] = [  # whether nothing reads, in a group, these keys, and because of what
        (model.adapter is None, "model.lora", model.lora, tuple(field.name for field in fields(model.lora)), "model.adapter=null"),
        (model.adapter is None, "checkpoint", config.checkpoint, ("hf_merge",), "model.adapter=null"),
        (optimizer.name == "adamw", "optimizer", optimizer, ("momentum",), "optimizer.name=adamw"),
        (optimizer.name == "sgd", "optimizer", optimizer, ("betas", "eps"), "optimizer.name=sgd"),
        (optimizer.nonfinite == "error", "optimizer", optimizer, ("max_nonfinite",), "optimizer.nonfinite=error"),
        (scheduler.name != "wsd", "scheduler", scheduler, ("decay_ratio",), f"scheduler.name={scheduler.name}"),
        (scheduler.name == "constant", "scheduler", scheduler, ("lr_min",), "scheduler.name=constant"),
        (scheduler.warmup_steps is not None, "scheduler", scheduler, ("warmup_ratio",), f"scheduler.warmup_steps={scheduler.warmup_steps}"),
        (config.data.eval_path is None and config.data.eval_ratio is None, "trainer", trainer, ("eval_interval",), "no held-out data"),
        (not trainer.sample_prompts, "trainer", trainer, ("sample_tokens",), "trainer.sample_prompts=[]"),
    ]
    unread_settings = [
        f"{prefix}.{name}={value} does nothing with {reason}"
        for unread, prefix, group, names, reason in rules
        for name, value in _changed(group)
        if unread and name in names
    ]
    if scheduler.name != "constant" and scheduler.lr_min > optimizer.lr:
        unread_settings.append(f"scheduler.lr_min={scheduler.lr_min:g} is above optimizer.lr={optimizer.lr:g}, where the rate stays")
    return unread_settings


def _changed(group: Any) -> list[tuple[str, Any]]:
    """(name, value) of the fields of a dataclass that are not as by default."""
    default = type(group)()
    return [(field.name, value) for field in fields(group) if (value := getattr(group, field.name)) != getattr(default, field.name)]
