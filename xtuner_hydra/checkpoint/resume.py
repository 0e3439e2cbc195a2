"""Which checkpoint a run continues from, and whether it is allowed to."""

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
"""Keys of `model`, `model.moe` and `model.lora` that change what is computed but no tensor's name or shape."""
_MAY_CHANGE = ("optimizer.", "scheduler.", "parallelism.")
"""Groups of keys that are often changed between the parts of a run and do not affect its samples."""

log = logging.getLogger("xtuner_hydra")


def find(config: CheckpointConfig, run_dir: Path) -> Path | None:
    """The checkpoint that checkpoint.resume names, after checking all of it for damage; None to start at step 0.

    Raises RefusedError for a path that holds none, and if all checkpoints there are damaged."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        try:
            put_back(run_dir / "checkpoints")
        except OSError as error:
            raise RefusedError(
                f"{error.filename}: was set aside by an interrupted save and cannot be renamed back: {error.strerror}"
            ) from None
        return _newest(run_dir / "checkpoints")
    path = Path(config.resume).expanduser().resolve()
    if not config.resume.strip() or not path.exists():
        raise RefusedError(
            f"checkpoint.resume={config.resume}: no such file or directory; give auto, never, or the path of a run or a checkpoint"
        )
    if has_step_name(path):
        if problem := damage(path, content=True):
            raise RefusedError(f"checkpoint.resume={config.resume}: not a complete checkpoint: {problem}")
        found: Path | None = path
    else:
        found = _newest(path / "checkpoints") or _newest(path)
    if found is None:
        raise RefusedError(f"checkpoint.resume={config.resume}: holds no checkpoint (checkpoints/step-N)")
    if not is_checkpoint(found):
        raise RefusedError(
            f"checkpoint.resume={config.resume}: {found.name} is an export, which has no optimizer state; give its run, or a directory in "
            f"the run's checkpoints/, or start a new run from these weights with model=hf model.pretrained={found}"
        )
    return found


def _newest(parent: Path) -> Path | None:
    """The newest undamaged checkpoint under `parent`. Raises RefusedError if all are damaged."""
    found = newest_whole(parent)
    if found is None and (there := numbered(parent)):
        raise RefusedError(
            f"{parent}: all its checkpoints are damaged (the oldest: {damage(there[0], content=True)}), and starting over would overwrite "
            "the run's files. Start a new run in another directory, or remove them"
        )
    return found


def refuse_other_trajectory(checkpoint: Path, now: dict[str, Any], allowed: list[str]) -> None:
    """RefusedError listing what differs between the checkpoint's run and this one, if that changes the trajectory and is not `allowed`.

    `allowed` holds keys, or groups of them (`model`). A change that needs other tensors cannot be allowed: the checkpoint lacks them. A learning
    rate and the like need no permission; their change is reported as a warning."""
    before = state_file(checkpoint)["trajectory"]
    differing = _differing(before, now)
    unfit = [key for key in differing if _other_tensors(key, before, now)]
    free = [key for key in differing if key not in unfit and key.startswith(_MAY_CHANGE)]
    refused = [key for key in differing if key not in free and (key in unfit or not {key, key.partition(".")[0]} & set(allowed))]
    if not refused:
        for change in changes(checkpoint, now):
            log.warning(f"checkpoint.resume: {change}")
        if "data.path" in differing and now.get("data.eval_ratio") is not None:
            log.warning(
                "checkpoint.resume: data.eval_ratio holds out other samples than before, some of which have been trained on: evaluations look better "
                "than they are. Name held-out data with data.eval_path"
            )
        return
    names = {"data.path": "data.path (its content, or how data.bad_lines, the tokenizer and its chat template read it)"}
    differences = ", ".join(f"{names.get(key, key)}: {before.get(key)} -> {now.get(key)}" for key in refused)
    advice = (
        f"or start a new run from its exported weights with model=hf model.pretrained=EXPORT: it has no tensors for another {', '.join(unfit)}"
        if unfit
        else f"or accept a different trajectory with 'checkpoint.allow_change=[{','.join(refused)}]'"
    )
    raise RefusedError(
        f"checkpoint.resume: {checkpoint} belongs to a run with different settings ({differences}). Give the same values, start over with "
        f"checkpoint.resume=never, {advice}"
    )


def changes(checkpoint: Path, now: dict[str, Any]) -> list[str]:
    """A phrase for each setting that is another one after `checkpoint` than before."""
    before = state_file(checkpoint)["trajectory"]
    # older checkpoints name fewer keys; auto: another machine decides
    known = [key for key in _differing(before, now) if now.get(key) != "auto" and (key in before or not key.startswith(_MAY_CHANGE))]
    return [f"{key} was {before.get(key)} until {checkpoint.name}, and is {now.get(key)} from there on" for key in known]


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]


def _other_tensors(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether weights or optimizer state differ in name, shape or origin between the two values of `key`."""
    old, new = before.get(key), now.get(key)
    group, _, name = key.partition(".")
    if group == "model" and isinstance(old, dict) and isinstance(new, dict):
        return any(old.get(part) != new.get(part) for part in old.keys() | new.keys() if part not in _SAME_TENSORS)
    if key == "optimizer.momentum":  # without it sgd keeps no state
        return before.get("optimizer.name") == now.get("optimizer.name") == "sgd" and 0 in (old, new)
    return key in ("optimizer.name", "trainer.freeze") or (group == "model" and name not in _SAME_TENSORS)


def refuse_beyond(checkpoint: Path, total_steps: int) -> None:
    """RefusedError if the checkpoint is beyond the `total_steps` asked for."""
    if (step := state_file(checkpoint)["state"]["step"]) > total_steps:
        raise RefusedError(
            f"checkpoint.resume: {checkpoint} is beyond the end, step {total_steps} (trainer.total_steps, trainer.epochs, "
            f"trainer.total_tokens): {step} steps are done. Ask for at least that many, or continue from an earlier checkpoint in a new directory"
        )
