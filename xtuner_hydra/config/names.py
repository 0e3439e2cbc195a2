"""Names of runs and jobs: short, safe in a path and on a command line, made from the chosen options and what was overridden."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

MAX_LENGTH = 80  # of a name; a path component may have 255 bytes, and a time or a number stands before it


def split_override(override: str) -> tuple[str, str]:
    """(key, value) of an override as typed, `optimizer.lr=1e-4`; Hydra's `+` and `++` before the key are left out."""
    key, _, value = override.lstrip("+").partition("=")
    return key, value


def run_name(choices: Mapping[str, str | None], overrides: Sequence[str]) -> str:
    """`qwen3_tiny-openai_sft-lr1e-4` from Hydra's choices of groups and the overrides typed (`optimizer.lr=1e-4`).

    A run that repeats another has that one's name among the choices, as `rerun`, and goes by it."""
    groups = {key for key, _ in map(split_override, overrides) if "." not in key}
    first = choices.get("rerun")
    told = () if first else ("model", "data", "experiment")  # by the first part
    parts = [first or choices.get("experiment") or f"{choices.get('model')}-{choices.get('data')}"]
    parts += [str(choices[group]) for group in ("debug", *sorted(groups)) if choices.get(group) and group not in told]
    return _safe("-".join(dict.fromkeys(parts)) + _values(overrides))


def job_name(number: int, overrides: Sequence[str]) -> str:
    """`3_lr6e-05-scheduler_linear`: a sweep's job by its number and what sets it apart; of a path the last part."""
    parts = []
    for key, value in map(split_override, overrides):
        parts.append(_part(key, value.rstrip("/").rpartition("/")[2]))
    return _safe(f"{number}_" + "-".join(parts)).rstrip("_")


def is_plain(name: str) -> bool:
    """Whether `name` is one part of a path, so that it cannot lead out of the directory in which it stands."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f]", name)


def _values(overrides: Sequence[str]) -> str:
    """`-lr1e-4` for every key that is overridden; paths and directories say little and are left out."""
    text = ""
    for key, value in map(split_override, overrides):
        if "." in key and not key.startswith(("hydra.", "tracking.")) and "/" not in value:
            text += "-" + _part(key, value)
    return text


def _part(key: str, value: str) -> str:
    """`lr1e-4`, `pack_strategy_soft`."""
    return f"{key.rpartition('.')[2]}{'' if re.match(r'[0-9.-]', value) else '_'}{value}"


def _safe(name: str) -> str:
    """`name` in letters, digits and `._-` only (`=` and `,` would need quoting in a later override), at most MAX_LENGTH long."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._-")[:MAX_LENGTH].rstrip("._-")


def as_typed(key: str, path: Path) -> str:
    """`key=path` as one types it in a shell; with quotes of Hydra's too where the path has characters that mean something to Hydra."""
    text = str(path)
    if not re.fullmatch(r"[\w./:@%+-]+( [\w./:@%+-]+)*", text):
        text = "'" + text.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={text}")
