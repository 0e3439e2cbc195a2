"""The training state that a checkpoint holds, and how it is restored.

checkpoints/step-N/  rank-R.safetensors tensors.json   weights and optimizer, sharded (storage.py); frozen weights are left out: they come
                                                       from where the run got them, the pretrained weights or the seed
                     state.json                        TrainState and what shaped the trajectory
                     rng-R.json                        rank R's random number generators
                     manifest.json                     every file with its size and checksum"""

from __future__ import annotations

import base64
import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from xtuner_hydra.checkpoint.commit import Checksums
from xtuner_hydra.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from xtuner_hydra.config.schema import Config
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.files import checksum, write_json
from xtuner_hydra.model.pretrained import fingerprint

Tensors = dict[str, torch.Tensor]
Optimizers = Sequence[torch.optim.Optimizer]

_ORDER = ("sample_ratio", "max_length", "overlong", "pack_strategy", "pack_max_length", "shuffle", "eval_ratio")
"""Keys of `data` that decide which samples form which step."""

# frozen weights are missing; if any other is, dcp.load fails
_PARTIAL = StateDictOptions(strict=False, flatten_optimizer_state_dict=True)
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps. The data cursor is the step: the plan of packs is a pure function of config and data.

    skipped_in_a_row: updates left out since the last one made. schedule_steps: length of the learning rate's schedule. evaluation: metrics
    of the evaluation after this very step, if there was one. sampled: whether the prompts have been answered after it. changes: what the
    run was resumed with that was another value before, in words."""

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    schedule_steps: int = 0
    evaluation: dict[str, float | int | None] = field(default_factory=dict)
    sampled: bool = False
    changes: list[str] = field(default_factory=list)

    def advance(self, *, epoch: int, tokens: int, updated: bool) -> None:
        """Count one finished step."""
        self.step += 1
        self.epoch = epoch
        self.tokens += tokens
        self.skipped_updates += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        self.evaluation, self.sampled = {}, False


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, at one moment. tensors: weights and optimizer state, this rank's shards, on the device or copied."""

    tensors: Tensors
    state: TrainState
    trajectory: dict[str, Any]
    rng: dict[str, Any]

    def write(self, directory: Path, group: dist.ProcessGroup | None = None) -> Checksums:
        """Write it into `directory`; the checksums of what this rank wrote. Collective over `group`."""
        writer = SafetensorsWriter(directory)
        dcp.save(self.tensors, storage_writer=writer, process_group=group)
        rng = directory / f"rng-{dist.get_rank()}.json"
        write_json(rng, self.rng)
        if dist.get_rank() == 0:
            write_json(directory / "state.json", {"state": asdict(self.state), "trajectory": self.trajectory})
        return writer.checksums | {rng.name: checksum(rng)}


def trained_tensors(model: torch.nn.Module, optimizers: Optimizers) -> Tensors:
    """Trained weights and the optimizers' state, under flat names, sharing memory with the originals. Collective."""
    weights, moments = _trained(model, optimizers)
    return _tensors("model", weights) | _tensors("optimizer", moments)


def load(checkpoint: Path, model: torch.nn.Module, optimizers: Optimizers) -> TrainState:
    """Read one of our checkpoints into `model` and `optimizers`, whatever the number of ranks that wrote it. Collective.

    Raises RefusedError if it does not fit them."""
    weights, moments = _trained(model, optimizers)
    _read(checkpoint, _tensors("model", weights) | _tensors("optimizer", moments))
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments, options=_PARTIAL)
    rng = checkpoint / f"rng-{dist.get_rank()}.json"
    if rng.exists():  # a rank that the earlier run did not have starts from its seed
        set_rng_state(json.loads(rng.read_text(encoding="utf-8")))
    return TrainState(**state_file(checkpoint)["state"])


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Read a checkpoint's weights alone into `model`, sharded or plain, in the model's dtype; frozen ones, which it does not hold, stay.
    Collective if there is a process group.

    Raises RefusedError if they do not fit the model."""
    weights = _without_frozen(model, get_model_state_dict(model))
    _read(checkpoint, _tensors("model", weights))
    set_model_state_dict(model, weights, options=_PARTIAL)


def _trained(model: torch.nn.Module, optimizers: Optimizers) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trained weights, and the optimizer's state and hyperparameters under flat names. Collective."""
    untouched = [optimizer for optimizer in optimizers if not optimizer.state]
    weights, moments = get_state_dict(model, optimizers, options=_FLAT)
    for optimizer in untouched:  # torch has made their state with a step of its own, which is counted and applies weight decay
        for value in (value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)):
            value.zero_()
    return _without_frozen(model, weights), moments


def _read(checkpoint: Path, tensors: Tensors) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")  # it is
            dcp.load(tensors, storage_reader=SafetensorsReader(checkpoint))
    except (dcp.CheckpointException, ValueError, OSError) as error:  # not a RuntimeError: that is a rank that has gone
        raise RefusedError(f"{checkpoint}: its tensors do not fit the model of config.yaml ({_last_line(error)})") from None


def _tensors(prefix: str, values: dict[str, Any]) -> Tensors:
    """The tensors of `values`. The rest are hyperparameters, which come from the config."""
    return {f"{prefix}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _without_frozen(model: torch.nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    # not torch's ignore_frozen_params, which forgets a tied weight's second name
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: value for name, value in weights.items() if name not in frozen}


def trajectory(config: Config, content: str) -> dict[str, Any]:
    """What decides a run's steps, by key. A run that continues another must share it, apart from what may be changed (resume.py).
    `content`: fingerprint of the training data."""
    plain = asdict(config)
    aside = {"pretrained", "strict", "tokenizer", "chat_template"} | ({"lora"} if config.model.adapter is None else set())
    model = {key: value for key, value in plain["model"].items() if key not in aside}
    base = config.model.pretrained if config.has_frozen else None  # otherwise the checkpoint holds every weight
    return {
        "data.path": content,
        **{f"data.{key}": plain["data"][key] for key in _ORDER},
        "data.sources": [source["sample_ratio"] for source in plain["data"]["sources"] or []],
        **{f"model.{key}": value for key, value in model.items()},
        "model.pretrained": base and fingerprint(base),
        **{f"optimizer.{key}": value for key, value in plain["optimizer"].items()},
        **{f"scheduler.{key}": value for key, value in plain["scheduler"].items()},
        "parallelism.param_dtype": plain["parallelism"]["param_dtype"],
        "parallelism.reduce_dtype": plain["parallelism"]["reduce_dtype"],
        "trainer.global_batch_size": plain["trainer"]["global_batch_size"],
        "trainer.seed": plain["trainer"]["seed"],
        "trainer.freeze": plain["trainer"]["freeze"],
    }


def is_checkpoint(directory: Path) -> bool:
    """Whether a committed directory is a checkpoint and not an export."""
    return (directory / "state.json").is_file()


def refuse_other_base(checkpoint: Path, pretrained: str | None) -> None:
    """RefusedError where a checkpoint lacks the frozen weights and those in `pretrained`, where they came from, are no longer the same."""
    base = state_file(checkpoint)["trajectory"].get("model.pretrained")
    if base is not None and (pretrained is None or fingerprint(pretrained) != base):
        raise RefusedError(
            f"{checkpoint}: holds only what was trained; the weights in {pretrained}, its base, have changed since. Restore them, or name a copy of "
            "the old ones with model.pretrained"
        )


def state_file(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: `state` (TrainState's fields), `trajectory`."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def rng_state() -> dict[str, Any]:
    """This rank's generators: torch's on the CPU and, if used, on the GPU; NumPy's and Python's for user code."""
    state: dict[str, Any] = {"torch": _encode(torch.get_rng_state()), "python": random.getstate()}
    kind, keys, *rest = np.random.get_state(legacy=True)
    state["numpy"] = [kind, np.asarray(keys).tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore this rank's generators to what `rng_state` returned."""
    torch.set_rng_state(_decode(state["torch"]))
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
