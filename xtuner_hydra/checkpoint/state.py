"""The training state that a checkpoint holds, and which checkpoint a run continues from.

checkpoints/step-N/  *.distcp .metadata   weights and optimizer, sharded (torch.distributed.checkpoint); frozen weights are left out:
                                          they come from where the run had them from, pretrained or the seed
                     state.json           TrainState and what shaped the trajectory
                     rng-R.json           rank R's random number generators
"""

from __future__ import annotations

import base64
import json
import random
import warnings
from dataclasses import asdict, dataclass
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

from xtuner_hydra.checkpoint.commit import commit, committed, damage
from xtuner_hydra.config.schema import CheckpointConfig, Config
from xtuner_hydra.config.strict import to_dict
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.files import write_json
from xtuner_hydra.model.pretrained import fingerprint

# frozen weights are missing; what a checkpoint lacks of the others, dcp.load refuses
_PARTIAL = StateDictOptions(strict=False)


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps. The data cursor is the step: the plan of packs is a pure function of config and data."""

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    skipped_updates: int = 0

    def advance(self, *, epoch: int, tokens: int, updated: bool) -> None:
        """Count one finished step."""
        self.step += 1
        self.epoch = epoch
        self.tokens += tokens
        self.skipped_updates += not updated


def save(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, trajectory: dict[str, Any], keep: int
) -> None:
    """Commit checkpoints/step-N. Collective."""

    def write(staging: Path) -> None:
        weights, moments = _trained(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=staging)
        write_json(staging / f"rng-{dist.get_rank()}.json", _rng_state())
        if dist.get_rank() == 0:
            write_json(staging / "state.json", {"state": asdict(state), "trajectory": trajectory})

    commit(directory / f"step-{state.step}", write, keep=keep)


def load(checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Read a checkpoint of ours into `model` and `optimizer`, whatever number of ranks wrote it. Collective."""
    weights, moments = _trained(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=_PARTIAL)
    rng = checkpoint / f"rng-{dist.get_rank()}.json"
    if rng.exists():  # a rank that the earlier run did not have starts from its seed
        _set_rng_state(json.loads(rng.read_text(encoding="utf-8")))
    return TrainState(**_state_file(checkpoint)["state"])


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Read a checkpoint's weights alone into `model`, sharded or plain, in the dtype that this has; frozen ones, which it does not hold, stay.
    Collective where ranks are joined.

    Raises RefusedError where they do not fit the model."""
    weights = _without_frozen(model, get_model_state_dict(model))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")  # it is
            dcp.load({"model": weights}, checkpoint_id=checkpoint)
    except (dcp.CheckpointException, ValueError, RuntimeError) as error:
        raise RefusedError(f"{checkpoint}: its weights do not fit the model of config.yaml ({_last_line(error)})") from None
    set_model_state_dict(model, weights, options=_PARTIAL)


def _trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights that are trained, and the optimizer's state. Collective."""
    weights, moments = get_state_dict(model, optimizer)
    return _without_frozen(model, weights), moments


def _without_frozen(model: torch.nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    # not torch's ignore_frozen_params, which forgets a tied weight's second name
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: value for name, value in weights.items() if name not in frozen}


def find(config: CheckpointConfig, run_dir: Path) -> Path | None:
    """The checkpoint that checkpoint.resume names, None to start at step 0. Raises RefusedError for a path that holds none."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return newest(run_dir / "checkpoints")
    path = Path(config.resume).resolve()
    if not path.exists():
        raise RefusedError(f"checkpoint.resume={config.resume}: no such file or directory")
    if path.name.startswith("step-"):
        if problem := damage(path):
            raise RefusedError(f"checkpoint.resume={config.resume}: not a whole checkpoint: {problem}")
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise RefusedError(f"checkpoint.resume={config.resume}: holds no checkpoint (checkpoints/step-N)")
    return found


def newest(parent: Path) -> Path | None:
    """The newest committed checkpoint under `parent`."""
    found = committed(parent)
    return found[-1] if found else None


def trajectory(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What a resumed run must share with the run it continues, or its steps would not follow on."""
    plain = to_dict(config)
    aside = {"pretrained", "strict", "tokenizer", "chat_template"} | ({"lora"} if config.model.adapter is None else set())
    model = {key: value for key, value in plain["model"].items() if key not in aside}
    base = config.model.pretrained if config.has_frozen else None  # or the checkpoint holds every weight
    return {
        "data": data_fingerprint,
        **{f"model.{key}": value for key, value in model.items()},
        "model.pretrained (a hash of its weights)": base and fingerprint(base),
        "optimizer.name": plain["optimizer"]["name"],
        "trainer.global_batch_size": plain["trainer"]["global_batch_size"],
        "trainer.seed": plain["trainer"]["seed"],
        "trainer.freeze": plain["trainer"]["freeze"] or None,  # as in checkpoints from before the key
    }


def refuse_other_trajectory(checkpoint: Path, now: dict[str, Any]) -> None:
    """RefusedError that lists what differs between the checkpoint's run and this one, where that changes the trajectory."""
    before = _state_file(checkpoint)["trajectory"]
    differences = [
        f"{key}: {before.get(key)} -> {now.get(key)}" for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
    ]
    if differences:
        raise RefusedError(
            f"checkpoint.resume: {checkpoint} belongs to a run with another {', '.join(differences)}. "
            "Give the same values, or start anew with checkpoint.resume=never"
        )


def _state_file(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _rng_state() -> dict[str, Any]:
    """This rank's generators: torch on the CPU and, where it is used, on the GPU; NumPy's and Python's for user code."""
    state: dict[str, Any] = {"torch": _encode(torch.get_rng_state()), "python": random.getstate()}
    kind, keys, *rest = np.random.get_state(legacy=True)
    state["numpy"] = [kind, np.asarray(keys).tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
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
