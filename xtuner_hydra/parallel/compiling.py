"""Whether a run is long enough for torch.compile: what it saves over the whole run against what it costs at the start."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from xtuner_hydra.config.schema import Config, ModelConfig
from xtuner_hydra.errors import ConfigError

COST = 20.0
"""Seconds by which the first step is longer with an empty cache (2 cores: 15 to 20; with a full one 5)."""
SAVED = {"cpu": 1e-9, "cuda": 2e-11}
"""Seconds saved per element that the compiled functions pass over, forward and backward together, with all ranks at work. Measured on a CPU
(2 cores, 0.25 s of a step with 260 million elements); a GPU's is that divided by the ratio of memory bandwidths: not run on a GPU."""


@dataclass(frozen=True)
class Choice:
    """Whether to compile; `why`: a sentence for the log."""

    enabled: bool
    why: str


def choose_compile(config: Config, device: str, world_size: int, total_tokens: int) -> Choice:
    """What parallelism.compile means for a run over `total_tokens` on `world_size` devices (`cpu` or `cuda`).

    `auto` compiles if that saves at least twice its cost. Raises ConfigError for `true` without a C++ compiler."""
    wish = config.parallelism.compile
    if wish == "false":
        return Choice(False, "off (parallelism.compile=false)")
    lacking = _lacking() if device == "cpu" else None
    if wish == "true" and lacking:
        raise ConfigError("parallelism.compile", wish, f"there is no {lacking}; install it (apt install g++ python3-dev), or use auto")
    devices = 1 if device == "cpu" else world_size  # ranks on a CPU share its cores
    saved = SAVED[device] * _elements(config.model) * total_tokens / devices
    estimate = f"it would save about {saved:.0f} s of this run and cost up to {COST:.0f} s at its start"
    if wish == "auto" and saved < 2 * COST:
        return Choice(False, f"off ({estimate}; parallelism.compile=true forces it)")
    if lacking:
        return Choice(False, f"off (there is no {lacking})")
    return Choice(
        True, f"on for norms, rotations, SwiGLU and loss ({estimate}); the code is cached for later runs in TORCHINDUCTOR_CACHE_DIR"
    )


def _elements(model: ModelConfig) -> int:
    """Elements per token that the compiled functions pass over: inner states of MLP, heads and norms of each layer, and the logits."""
    inner = model.intermediate_size
    if model.moe is not None:
        inner = model.moe.num_experts_per_tok * model.moe.moe_intermediate_size
    heads = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    return model.num_hidden_layers * (inner + heads + 2 * model.hidden_size) + model.vocab_size


def _lacking() -> str | None:
    """What inductor needs to compile for a CPU and this machine lacks."""
    compiler = os.environ.get("CXX", "g++")  # inductor tries no other
    if shutil.which(compiler) is None:
        return f"C++ compiler {compiler} (CXX names another)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"{header}"
