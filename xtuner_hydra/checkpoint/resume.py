"""Which checkpoint a run continues from, and whether it may."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from xtuner_hydra.checkpoint.commit import damage, has_step_name, newest_whole, numbered, put_back
from xtuner_hydra.checkpoint.state import is_checkpoint, state_file
from xtuner_hydra.config.schema import CheckpointConfig
from xtuner_hydra.errors import RefusedError

_SAME_TENSORS = {"rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window", "max_position_embeddings", "pretrained",
                 "norm_topk_prob", "router_aux_loss_coef", "num_experts_per_tok", "alpha", "dropout"}  # fmt: skip
"""Keys of `model`, `model.moe` and `model.lora` that change what is computed and not with which tensors."""
_MAY_CHANGE = ("optimizer.", "scheduler.", "parallelism.")
"""Groups of keys that are changed on purpose between the parts of a run, and with which its samples stay the same."""

log = logging.getLogger("xtuner_hydra")


def find(config: CheckpointConfig, run_dir: Path) -> Path | None:
    """The checkpoint that checkpoint.resume names, read whole and found undamaged; None to start at step 0.

    Raises RefusedError for a path that holds none, and where there are checkpoints but not one that is whole."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        try:
            put_back(run_dir / "checkpoints")
        except OSError as error:
            raise RefusedError(
                f"{error.filename}: was set aside by a save that was cut short and cannot be given its name back: {error.strerror}"
            ) from None
        return _newest(run_dir / "checkpoints")
    path = Path(config.resume).resolve()
    if not path.exists():
        raise RefusedError(f"checkpoint.resume={config.resume}: no such file or directory")
    if has_step_name(path):
        if problem := damage(path, content=True):
            raise RefusedError(f"checkpoint.resume={config.resume}: not a whole checkpoint: {problem}")
        found: Path | None = path
    else:
        found = _newest(path / "checkpoints") or _newest(path)
    if found is None:
        raise RefusedError(f"checkpoint.resume={config.resume}: holds no checkpoint (checkpoints/step-N)")
    if not is_checkpoint(found):
        raise RefusedError(
            f"checkpoint.resume={config.resume}: {found.name} is an export, which has no optimizer's state; give its run, or a directory in "
            f"the run's checkpoints/, or begin a new run from these weights with model=hf model.pretrained={found}"
        )
    return found


def _newest(parent: Path) -> Path | None:
    """The newest whole checkpoint under `parent`. Raises RefusedError where there are only damaged ones."""
    found = newest_whole(parent)
    if found is None and (there := numbered(parent)):
        raise RefusedError(
            f"{parent}: none of its checkpoints is whole (the oldest: {damage(there[0], content=True)}), and starting over would overwrite "
            "what the run has left. Start a new run in another directory, or remove them"
        )
    return found


def refuse_other_trajectory(checkpoint: Path, now: dict[str, Any], allowed: list[str]) -> None:
    """RefusedError that lists what differs between the checkpoint's run and this one, where that changes the trajectory and is not `allowed`.

    `allowed` holds keys, or groups of them (`model`). What makes other tensors cannot be allowed: the checkpoint has none for them. A learning
    rate and the like may change without that, with a warning."""
    before = state_file(checkpoint)["trajectory"]
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    unfit = [key for key in differing if _other_tensors(key, before, now)]
    free = [key for key in differing if key not in unfit and key.startswith(_MAY_CHANGE)]
    refused = [key for key in differing if key not in free and (key in unfit or not {key, key.partition(".")[0]} & set(allowed))]
    if not refused:
        for key in differing:
            known = key in before and now.get(key) != "auto"  # older checkpoints name fewer keys; auto: another machine decides
            if known or key not in free:
                permission = "resume" if key in free else "allow_change"
                log.warning(
                    f"checkpoint.{permission}: {key} was {before.get(key)} until {checkpoint.name}, and is {now.get(key)} from there"
                )
        return
    differences = ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in refused)
    advice = (
        f"or begin a new run from its weights, exported, with model=hf model.pretrained=EXPORT: for another {', '.join(unfit)} it has no tensors"
        if unfit
        else f"or accept another trajectory with 'checkpoint.allow_change=[{','.join(refused)}]'"
    )
    raise RefusedError(
        f"checkpoint.resume: {checkpoint} belongs to a run with another {differences}. Give the same values, start anew with "
        f"checkpoint.resume=never, {advice}"
    )


def _other_tensors(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether weights or optimizer state have other names or shapes with the one value of `key` than with the other, or come from elsewhere."""
    old, new = before.get(key), now.get(key)
    group, _, name = key.partition(".")
    if group == "model" and isinstance(old, dict) and isinstance(new, dict):
        return any(old.get(part) != new.get(part) for part in old.keys() | new.keys() if part not in _SAME_TENSORS)
    if key == "optimizer.momentum":  # without it sgd keeps no state
        return before.get("optimizer.name") == now.get("optimizer.name") == "sgd" and 0 in (old, new)
    return key in ("optimizer.name", "trainer.freeze") or (group == "model" and name not in _SAME_TENSORS)


def refuse_beyond(checkpoint: Path, total_steps: int) -> None:
    """RefusedError where the checkpoint's run has gone further than the `total_steps` that are asked for."""
    if (step := state_file(checkpoint)["state"]["step"]) > total_steps:
        raise RefusedError(
            f"checkpoint.resume: {checkpoint} is beyond the end, step {total_steps} (trainer.total_steps, trainer.epochs, "
            f"trainer.total_tokens): {step} steps are done. Ask for as many at least, or continue from an earlier checkpoint in a new directory"
        )
