"""The config's types, defaults and meaning: one dataclass a group, one field a key. The YAML files under conf/ hold the same
keys with the same defaults (tests/unit/config/test_schema.py keeps the two in step).

`__post_init__` refuses what a group can see is impossible; what needs two groups or the machine is in `checks.py`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from xtuner_hydra.errors import ConfigError


@dataclass
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of the first training; names as in config.json."""

    rope_type: str = MISSING
    """`linear` (all frequencies divided by `factor`) or `llama3` (low ones only, with a smooth transition)."""
    factor: float = MISSING
    """Divisor of the frequencies; llama3: of the low ones."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above original_max_position_embeddings / this are scaled in full."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original_max_position_embeddings / this are unchanged."""
    original_max_position_embeddings: int | None = None
    """llama3: context length of the original training."""

    def __post_init__(self) -> None:
        key = "model.rope_scaling"
        _one_of(f"{key}.rope_type", self.rope_type, ("linear", "llama3"))
        if not self.factor >= 1:
            raise ConfigError(f"{key}.factor", self.factor, "must be at least 1")
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            if self.rope_type == "linear" and value is not None:
                raise ConfigError(f"{key}.{name}", value, "linear scaling has a factor only; leave this null")
            if self.rope_type == "llama3" and value is None:
                raise ConfigError(f"{key}.{name}", None, "llama3 scaling needs a value")
            if value is not None:
                _positive(f"{key}.{name}", value)
        if self.low_freq_factor is not None and self.high_freq_factor is not None and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(f"{key}.low_freq_factor", self.low_freq_factor, f"must be below high_freq_factor={self.high_freq_factor}")


@dataclass
class MoEConfig:
    """A mixture of experts in the place of the MLP; names as in config.json."""

    num_experts: int = MISSING
    """Experts per layer."""
    num_experts_per_tok: int = MISSING
    """Experts that each token is routed to."""
    moe_intermediate_size: int = MISSING
    """Inner width of an expert."""
    norm_topk_prob: bool = False
    """Scale the chosen experts' probabilities to sum to 1."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss in the training loss; 0 = none."""
    decoder_sparse_step: int = 1
    """One layer in this many has experts; the others have an MLP of intermediate_size."""
    mlp_only_layers: list[int] = field(default_factory=list)
    """Layers (from 0) that have an MLP regardless."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
            _at_least(1, f"model.moe.{name}", getattr(self, name))
        _not_negative("model.moe.router_aux_loss_coef", self.router_aux_loss_coef)
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError("model.moe.num_experts_per_tok", self.num_experts_per_tok, f"there are only {self.num_experts} experts")


@dataclass
class LoRAConfig:
    """Low-rank adapters beside frozen linear layers; names as in peft, where `rank` is r."""

    rank: int = 16
    """Inner width of an adapter."""
    alpha: float = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed at random in training."""
    targets: Any = "all-linear"
    """Layers that get an adapter, by the ends of their names (`q_proj`, `[q_proj, v_proj]`); `all-linear` = every linear layer but the head."""

    def __post_init__(self) -> None:
        _at_least(1, "model.lora.rank", self.rank)
        _positive("model.lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError("model.lora.dropout", self.dropout, "must be from 0 to below 1")
        names = self.targets if isinstance(self.targets, list) else [self.targets]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ConfigError("model.lora.targets", self.targets, "must be all-linear, the name of a layer (q_proj), or a list of names")


@dataclass
class ModelConfig:
    family: str = "qwen3"
    """Architecture, a name in model/families/; `hf` reads it and the other shapes below from `pretrained`/config.json."""
    vocab_size: int = MISSING
    """Rows of the embedding and of the LM head."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    intermediate_size: int = MISSING
    """Inner width of the SwiGLU MLP."""
    num_hidden_layers: int = MISSING
    """Decoder layers."""
    num_attention_heads: int = MISSING
    """Query heads."""
    num_key_value_heads: int = MISSING
    """Key and value heads; must divide num_attention_heads."""
    head_dim: int = MISSING
    """Width of a head (need not be hidden_size / num_attention_heads)."""
    max_position_embeddings: int = 40960
    """Longest supported sequence in tokens."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: float = 1e6
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequencies scaled for long contexts (Llama 3.1 and later); null = none."""
    sliding_window: int | None = None
    """Tokens that a token attends to, itself included; null = all earlier ones in its document."""
    tie_word_embeddings: bool = False
    """Use the embedding as the LM head too."""
    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections only (Qwen2)."""
    qk_norm: bool = True
    """RMSNorm on the queries and keys of every head (Qwen3)."""
    moe: MoEConfig | None = None
    """Mixture of experts; null = an MLP in every layer."""
    pretrained: str | None = None
    """Hugging Face directory or Hub id to read weights from; null = random weights from trainer.seed."""
    strict: bool = True
    """Reject weights that are missing in `pretrained`, unexpected or of another shape; false = list them and start those from random values."""
    tokenizer: str | None = None
    """`byte`, or a directory or Hub id of a Hugging Face tokenizer; null = the one in `pretrained`, else `byte`."""
    chat_template: str | None = None
    """How messages become text: null = the tokenizer's own; or a .jinja file, or `qwen3`; with `byte` tokens `chatml` (the default) or `xtuner`."""
    adapter: str | None = None
    """`lora`: train small matrices alongside the frozen weights (LoRA); null = train the weights."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Used by adapter=lora."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if (value := getattr(self, name)) != MISSING:  # `model=hf` fills these in from pretrained/config.json
                _at_least(1, f"model.{name}", value)
        _positive("model.rms_norm_eps", self.rms_norm_eps)
        _positive("model.rope_theta", self.rope_theta)
        if self.sliding_window is not None:
            _at_least(1, "model.sliding_window", self.sliding_window)
        if self.attention_bias and self.qkv_bias:
            raise ConfigError("model.qkv_bias", True, "model.attention_bias=true has these biases already; set one of the two")
        if self.adapter not in ("lora", None):
            raise ConfigError("model.adapter", self.adapter, "must be lora or null")
        for name in ("pretrained", "tokenizer", "chat_template"):
            _not_empty(f"model.{name}", getattr(self, name))
        if self.family == "hf" and self.pretrained is None:
            raise ConfigError("model.pretrained", None, "model=hf needs model.pretrained=DIR or a Hub id, a Hugging Face model")

    @property
    def has_base(self) -> bool:
        """True where every weight comes from `pretrained`, so that an adapter can be used with that."""
        return self.pretrained is not None and self.strict

    def has_experts(self, layer: int) -> bool:
        """True where decoder layer number `layer` (from 0) has a mixture of experts in the place of its MLP."""
        moe = self.moe
        return moe is not None and layer not in moe.mlp_only_layers and (layer + 1) % moe.decoder_sparse_step == 0


FORMATS = ("openai", "sharegpt", "alpaca", "prompt_completion", "text")
"""Shapes of a record that data/formats.py reads."""


@dataclass
class SourceConfig:
    """One of the sources of a mixture (data.sources)."""

    path: Any = MISSING
    """Like data.path."""
    format: str | None = None
    """Like data.format; null = that one."""
    sample_ratio: float = 1.0
    """Repeats per epoch, times data.sample_ratio."""


@dataclass
class DataConfig:
    path: Any = MISSING
    """File (.jsonl, .json, .parquet; .gz, .zst), directory (read recursively), glob, or a list of these."""
    format: str = "openai"
    """Shape of a record: `openai`, `sharegpt`, `alpaca`, `prompt_completion`, `text`, or package.module:function, your own code."""
    sources: list[SourceConfig] | None = None
    """A mixture in place of `path`: a list of {path, format, sample_ratio}."""
    sample_ratio: float = 1.0
    """Repeats per epoch; 2.5 = twice plus a random half, drawn once with trainer.seed."""
    max_length: int | None = None
    """Longest sample in tokens; null = pack_max_length, for held-out data model.max_position_embeddings (`hard`: no limit)."""
    overlong: str = "truncate"
    """Longer samples: `truncate` (counted and reported), `drop`, `error`."""
    bad_lines: str = "error"
    """Unusable lines: `error` stops, `skip` counts and lists them."""
    pack_strategy: str = "best_fit"
    """`best_fit` (fullest, new each epoch), `soft` (XTuner's: whole samples, in order), `hard` (one stream, cut), `none` (one sample per pack)."""
    pack_max_length: int = 2048
    """Tokens per pack; the longest sequence that the model sees."""
    shuffle: bool = True
    """New order each epoch, from trainer.seed; false = the file's order."""
    cache_dir: str | None = None
    """Token cache; null = $XDG_CACHE_HOME/xtuner_hydra, else ~/.cache/xtuner_hydra."""
    num_workers: int | None = None
    """Tokenizer processes; null = one per core, 0 = in the main process."""
    eval_path: Any = None
    """Held-out data, given like `path`; null = none unless eval_ratio is set."""
    eval_ratio: float | None = None
    """Share of the data to hold out, chosen by content; not together with eval_path."""

    def __post_init__(self) -> None:
        _format("data.format", self.format)
        _one_of("data.overlong", self.overlong, ("truncate", "drop", "error"))
        _one_of("data.bad_lines", self.bad_lines, ("error", "skip"))
        _one_of("data.pack_strategy", self.pack_strategy, ("best_fit", "soft", "hard", "none"))
        _positive("data.sample_ratio", self.sample_ratio)
        _not_empty("data.cache_dir", self.cache_dir)
        _at_least(2, "data.pack_max_length", self.pack_max_length)
        if self.max_length is not None:
            _at_least(2, "data.max_length", self.max_length)
            if self.pack_strategy != "hard" and self.max_length > self.pack_max_length:
                raise ConfigError(
                    "data.max_length",
                    self.max_length,
                    f"longer than data.pack_max_length={self.pack_max_length}; raise that, or lower this",
                )
        if self.num_workers is not None:
            _at_least(0, "data.num_workers", self.num_workers)
        _paths("data.path", self.path, required=not self.sources)
        _paths("data.eval_path", self.eval_path, required=False)
        if self.sources and self.path is not None:
            raise ConfigError(
                "data.sources", "[...]", "data.path is set too; set data.path=null, or start from data=openai, which has none"
            )
        self._check_sources()
        self._check_eval_ratio()

    def _check_sources(self) -> None:
        for i, source in enumerate(self.sources or []):
            _paths(f"data.sources[{i}].path", source.path, required=True)
            _positive(f"data.sources[{i}].sample_ratio", source.sample_ratio)
            if source.format is not None:
                _format(f"data.sources[{i}].format", source.format)

    def _check_eval_ratio(self) -> None:
        if self.eval_ratio is None:
            return
        if not 0 < self.eval_ratio < 1:
            raise ConfigError("data.eval_ratio", self.eval_ratio, "must be above 0 and below 1")
        if self.eval_path is not None:
            raise ConfigError("data.eval_ratio", self.eval_ratio, "data.eval_path is set too; set one of them to null")


@dataclass
class ParallelismConfig:
    nproc_per_node: int | None = 1
    """Workers on this machine; null = one per GPU (one without GPUs); ignored under torchrun."""
    dp_shard: int = -1
    """Ranks that share one copy of the weights (FSDP2); -1 = number of ranks / dp_replicate."""
    dp_replicate: int = 1
    """Copies of the weights (HSDP)."""
    param_dtype: str = "auto"
    """Compute dtype: `bfloat16`, `float32`, `auto` (bfloat16 where the device multiplies it fast). Master weights are float32."""
    reduce_dtype: str = "float32"
    """Dtype in which gradients are summed over ranks: `float32`, `bfloat16`."""
    recompute_ratio: float = 0.0
    """Share of the decoder layers whose activations are recomputed in the backward pass instead of kept."""
    reshard_after_forward: bool = False
    """Free a layer's gathered weights after its forward pass: less memory, one more gather."""
    compile: str = "auto"
    """torch.compile for norms, rotations, SwiGLU and the loss: `true`, `false`, `auto` (if the run is long enough to pay off)."""
    max_restarts: int = 0
    """Restarts of the ranks from the last checkpoint after a crash; ignored under torchrun (use its --max-restarts)."""
    timeout: float = 1800.0
    """Seconds that the ranks wait for one that hangs before all of them exit."""

    def __post_init__(self) -> None:
        if self.nproc_per_node is not None:
            _at_least(1, "parallelism.nproc_per_node", self.nproc_per_node)
        if self.dp_shard != -1:
            _at_least(1, "parallelism.dp_shard", self.dp_shard, "-1 (all), or a number of ranks")
        _at_least(1, "parallelism.dp_replicate", self.dp_replicate)
        _at_least(0, "parallelism.max_restarts", self.max_restarts)
        _positive("parallelism.timeout", self.timeout)
        self.compile = self.compile.lower()  # YAML's true arrives as True
        _one_of("parallelism.compile", self.compile, ("auto", "true", "false"))
        _one_of("parallelism.param_dtype", self.param_dtype, ("auto", "bfloat16", "float32"))
        _one_of("parallelism.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))
        _between(0, 1, "parallelism.recompute_ratio", self.recompute_ratio)


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    """`adamw`, `muon` (for matrices between hidden states; AdamW for the rest), `sgd`."""
    lr: float = 6e-5
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay; `sgd` adds it, times the weights, to the gradient."""
    decay_all: bool = False
    """Decay norms and biases too (as XTuner does)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the first and second moment."""
    momentum: float = 0.95
    """Nesterov momentum of `muon` and `sgd`."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    nonfinite: str = "error"
    """On a NaN or infinite loss or gradient: `error` stops before the update, `skip` omits the update and counts it."""
    max_nonfinite: int = 10
    """`skip` gives up after this many updates in a row."""

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, ("adamw", "muon", "sgd"))
        _one_of("optimizer.nonfinite", self.nonfinite, ("error", "skip"))
        _at_least(1, "optimizer.max_nonfinite", self.max_nonfinite)
        _not_negative("optimizer.lr", self.lr)
        _not_negative("optimizer.weight_decay", self.weight_decay)
        _positive("optimizer.eps", self.eps)
        if not 0 <= self.momentum < 1:
            raise ConfigError("optimizer.momentum", self.momentum, "must be from 0 to below 1")
        _positive("optimizer.max_grad_norm", self.max_grad_norm)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optimizer.betas", list(self.betas), "two numbers, each from 0 to below 1")


@dataclass
class SchedulerConfig:
    name: str = "cosine"
    """`cosine`, `linear` (both down to lr_min), `constant`, or `wsd` (constant, then a straight line down to lr_min)."""
    lr_min: float = 1e-6
    """Learning rate at the end."""
    warmup_ratio: float | None = 0.03
    """Share of the steps that warm up, rounded down; used if warmup_steps is null."""
    warmup_steps: int | None = None
    """Steps that warm up: at 0-based step s the rate is lr * (s + 1) / warmup_steps."""
    decay_ratio: float = 0.2
    """`wsd`: share of the steps, at the end, that go down to lr_min."""

    def __post_init__(self) -> None:
        _one_of("scheduler.name", self.name, ("cosine", "linear", "constant", "wsd"))
        _between(0, 1, "scheduler.decay_ratio", self.decay_ratio)
        _not_negative("scheduler.lr_min", self.lr_min)
        if self.warmup_ratio is not None:
            _between(0, 1, "scheduler.warmup_ratio", self.warmup_ratio)
        if self.warmup_steps is not None:
            _at_least(0, "scheduler.warmup_steps", self.warmup_steps)


@dataclass
class TrainerConfig:
    total_steps: int | None = None
    """Optimizer steps; set at most one of total_steps, epochs, total_tokens (all null: one epoch)."""
    epochs: int | None = None
    """Passes over the data."""
    total_tokens: int | None = None
    """Stop with the step that reaches this many tokens."""
    max_seconds: float | None = None
    """Wall-clock limit in seconds, from the run's start; saves and exits with 75 before it; null = no limit."""
    global_batch_size: int | None = 1
    """Packs per optimizer step over all ranks; null = one per data-parallel rank."""
    seed: int = 42
    """Determines initial weights, data order and dropout."""
    freeze: list[str] = field(default_factory=list)
    """Parameters that are not trained, by name pattern (`*embed_tokens*`, `*.layers.0.*`)."""
    deterministic: bool = False
    """Forbid operations whose results vary from run to run (slower on GPUs)."""
    log_interval: int = 1
    """Steps between rows of metrics."""
    eval_interval: int | None = -1
    """Steps between evaluations; -1 = at the end only, null = never. Any interval also evaluates at the end."""
    profile_steps: int = 0
    """Steps to profile, after the first two: profile/trace.json, operators.txt."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model answers, greedily, at each evaluation; samples.jsonl, the report and W&B show how the answers change."""
    sample_tokens: int = 64
    """Maximum tokens per answer."""
    device: str = "auto"
    """`cpu`, `cuda`, `auto` (a GPU if there is one)."""

    def __post_init__(self) -> None:
        for name in ("total_steps", "epochs", "total_tokens", "global_batch_size"):
            if (value := getattr(self, name)) is not None:
                _at_least(1, f"trainer.{name}", value)
        if self.max_seconds is not None:
            _positive("trainer.max_seconds", self.max_seconds)
        _at_least(1, "trainer.log_interval", self.log_interval)
        _interval("trainer.eval_interval", self.eval_interval)
        _at_least(0, "trainer.profile_steps", self.profile_steps)
        _at_least(1, "trainer.sample_tokens", self.sample_tokens)
        if self.sample_prompts and self.eval_interval is None:
            raise ConfigError(
                "trainer.sample_prompts", list(self.sample_prompts), "they are answered at evaluations; set trainer.eval_interval too"
            )
        _one_of("trainer.device", self.device, ("auto", "cpu", "cuda"))
        if not 0 <= self.seed < 2**63:
            raise ConfigError("trainer.seed", self.seed, "a whole number from 0 to 2^63 - 1")
        durations = [name for name in ("total_steps", "epochs", "total_tokens") if getattr(self, name) is not None]
        if len(durations) > 1:
            raise ConfigError(
                f"trainer.{durations[0]}",
                getattr(self, durations[0]),
                f"trainer.{durations[1]}={getattr(self, durations[1])} is set too; set one of them to null",
            )


@dataclass
class CheckpointConfig:
    interval: int | None = -1
    """Steps between checkpoints to resume from; -1 = at the end only, null = never. Any interval also saves at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep multiples of this many steps permanently."""
    keep_best: str | None = None
    """Also keep the checkpoint with the smallest value of this evaluation metric (`eval/loss`)."""
    asynchronous: bool = False
    """Save in the background, from a copy (as much memory as the weights and the optimizer state)."""
    resume: str = "never"
    """`never`, `auto` (this run directory's newest checkpoint, else step 0), or a checkpoint or run directory to continue from in a new one."""
    allow_change: list[str] = field(default_factory=list)
    """Keys that may differ from the resumed run although they alter its trajectory (`data`, `trainer.seed`)."""
    hf_interval: int | None = -1
    """Steps between Hugging Face exports, like `interval`."""
    hf_keep: int = 1
    """Number of newest exports to keep."""
    hf_merge: bool | None = None
    """Merge an adapter into its base for export; false = export it alone (peft); null = alone if its base is model.pretrained."""

    def __post_init__(self) -> None:
        _interval("checkpoint.interval", self.interval)
        _interval("checkpoint.hf_interval", self.hf_interval)
        _at_least(1, "checkpoint.keep", self.keep)
        if self.keep_every is not None:
            _at_least(1, "checkpoint.keep_every", self.keep_every)
        if self.keep_best is not None:
            _one_of("checkpoint.keep_best", self.keep_best, ("eval/loss", "eval/perplexity"))
        _at_least(1, "checkpoint.hf_keep", self.hf_keep)


@dataclass
class WandbConfig:
    enabled: bool = True
    """Write a W&B run."""
    mode: str = "auto"
    """`online`, `offline`, `auto` (online with an API key, else offline)."""
    project: str = "xtuner_hydra"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null = the account's default."""
    group: str | None = None
    """Runs shown together; null = the sweep's name in a sweep."""
    name: str | None = None
    """Run name; null = the run directory's name without its time."""
    tags: list[str] = field(default_factory=list)
    """Labels, besides the names of model, data, experiment and debug options, and `sweep` for its jobs."""
    artifacts: str = "none"
    """What a completed run uploads: `none`, `export` (for transformers), `checkpoint` (to resume from), `all`; in a sweep only for kept jobs."""

    def __post_init__(self) -> None:
        _one_of("tracking.wandb.mode", self.mode, ("auto", "online", "offline"))
        _one_of("tracking.wandb.artifacts", self.artifacts, ("none", "export", "checkpoint", "all"))
        for name in ("project", "entity", "group", "name"):
            _wandb_name(f"tracking.wandb.{name}", getattr(self, name), strict=name in ("project", "entity"))


@dataclass
class TrackingConfig:
    jsonl: bool = True
    """metrics.jsonl, the source of every other view."""
    tensorboard: bool = True
    """TensorBoard event files."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""


@dataclass
class SweepConfig:
    search: str = "grid"
    """`grid` (every combination), `zip` (pairs the first values, then the second, like Python's zip), `random`, `bayes`."""
    params: dict[str, Any] = field(default_factory=dict)
    """What is swept, written as on the command line (`optimizer.lr: 1e-5,6e-5`); values typed there win."""
    trials: int = 20
    """Number of jobs that `random` and `bayes` draw."""
    early_stop: bool = False
    """`random`, `bayes`: stop unpromising jobs at their evaluations (successive halving)."""
    reduction_factor: int = 3
    """early_stop: one job in this many survives each rung."""
    metric: str | None = None
    """Metric that decides; null = eval/loss, or train/loss if no data is held out."""
    direction: str = "minimize"
    """`minimize` or `maximize` the metric."""
    resume: str | None = None
    """A sweep's directory, to run what is missing in it."""
    retries: int = 0
    """How often a failed job is retried."""
    fail_fast: bool = False
    """End the sweep at the first failed job."""
    keep: str = "best"
    """Whose checkpoints and exports are kept: `best` (the best job's so far), `all`, `none`."""

    def __post_init__(self) -> None:
        _one_of("sweep.search", self.search, ("grid", "zip", "random", "bayes"))
        _at_least(1, "sweep.trials", self.trials)
        _at_least(2, "sweep.reduction_factor", self.reduction_factor)
        _one_of("sweep.direction", self.direction, ("minimize", "maximize"))
        _at_least(0, "sweep.retries", self.retries)
        _one_of("sweep.keep", self.keep, ("best", "all", "none"))
        if self.early_stop and self.search not in ("random", "bayes"):
            raise ConfigError("sweep.early_stop", True, "a grid trains all its jobs to the end; take sweep.search=random or bayes")


@dataclass
class Config:
    """The whole config. Engine, trainer and data code take this or one of its parts, never a DictConfig."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    @property
    def has_frozen(self) -> bool:
        """True where some parameters are not trained: checkpoints leave them out."""
        return self.model.adapter is not None or bool(self.trainer.freeze)

    @property
    def exports_adapter(self) -> bool:
        """True where exports hold an adapter alone, False where they hold all weights."""
        merged = not self.model.has_base if self.checkpoint.hf_merge is None else self.checkpoint.hf_merge
        return self.model.adapter is not None and not merged


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(key, value, f"must be one of {', '.join(choices)}")


def _wandb_name(key: str, value: str | None, *, strict: bool) -> None:
    """Names that W&B takes (`strict`: as parts of an address), and none that could be taken for a path to somewhere else."""
    if value is None:
        return
    if re.search(r"[\x00-\x1f\x7f]", value) or not value.strip() or len(value) > 128:
        raise ConfigError(key, repr(value), "must be 1 to 128 characters, without control characters")
    if strict and re.search(r"[/\\#?%:]", value):
        raise ConfigError(key, value, "must not hold any of / \\ # ? % :, as it becomes part of an address")
    if value.startswith(("/", "~")) or ".." in re.split(r"[/\\]", value):
        raise ConfigError(key, value, "is a path; give a name")


def _format(key: str, value: str) -> None:
    if value not in FORMATS and not re.fullmatch(r"\w+(\.\w+)*:\w+", value):
        close = difflib.get_close_matches(value, FORMATS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(key, value, f"must be one of {', '.join(FORMATS)}, or package.module:function.{hint}")


def _at_least(low: int, key: str, value: int, why: str = "") -> None:
    if value < low:
        raise ConfigError(key, value, f"must be {why or f'at least {low}'}")


def _positive(key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(key, value, "must be a number above 0")


def _not_negative(key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(key, value, "must be a number, 0 or above")


def _between(low: float, high: float, key: str, value: float) -> None:
    if not low <= value <= high:
        raise ConfigError(key, value, f"must be from {low} to {high}")


def _interval(key: str, value: int | None) -> None:
    if value is not None and value != -1:
        _at_least(1, key, value, "a number of steps, -1 (at the end only) or null (never)")


def _not_empty(key: str, value: str | None) -> None:
    """As an unset variable of a shell leaves it; a path would then mean the working directory."""
    if value is not None and not value.strip():
        raise ConfigError(key, value, "is empty; give a value, or null")


def _paths(key: str, value: Any, *, required: bool) -> None:
    paths = value if isinstance(value, list) else [value]
    if value is None and not required:
        return
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ConfigError(key, value, "must be a file, a directory, a glob, or a list of these")
    if remote := [path for path in paths if "://" in path]:
        raise ConfigError(key, remote[0], "only local files are read; download it, and give its path")
