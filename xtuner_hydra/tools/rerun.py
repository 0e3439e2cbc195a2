"""`rerun RUN [overrides]`: repeat a run exactly, or with changes.

The truth is RUN/config.yaml, which is resolved. Differently from it, a rerun starts at step 0 where the run was to resume by itself
(checkpoint.resume=auto), and is a single run: a sweep's job loses its `sweep.*` settings and the names in W&B that came from the sweep and the
directory; names given by hand stay. The data must be the same, byte for byte, unless data.path or data.eval_path is given anew. What else
cannot be the same is said before it starts."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from xtuner_hydra.app import App
from xtuner_hydra.config.composition import Composition
from xtuner_hydra.config.names import split_override
from xtuner_hydra.config.schema import Config, SweepConfig
from xtuner_hydra.errors import EXIT_DONE, DataError, RefusedError
from xtuner_hydra.machine import own_rank
from xtuner_hydra.recompose import recompose
from xtuner_hydra.results.run import Run, load_run
from xtuner_hydra.safe_text import printable
from xtuner_hydra.tracking.environment import environment

DECIDING = ("xtuner_hydra", "python", "torch", "numpy", "transformers", "safetensors")
"""Packages that the numbers depend on."""

HELP = """usage: xtuner-hydra rerun RUN [KEY=VALUE]... [GROUP=OPTION]... [--config-dir DIR] [--trust]

Repeat the run of the directory RUN, exactly or with changes. GROUP=OPTION replaces the whole group by that option.
hydra.run.dir=DIR chooses the directory; else it is outputs/<date>/<time>_<name of RUN>.
--trust runs the function that RUN names in data.format=package.module:function, where it does; read it first.

  xtuner-hydra rerun outputs/mine
  xtuner-hydra rerun outputs/mine optimizer.lr=1e-4 trainer.total_steps=200
  xtuner-hydra rerun outputs/mine optimizer=adamw hydra.run.dir=outputs/again"""


def main(argv: list[str]) -> int:
    """Repeat a run; returns its exit code. Raises RefusedError where it cannot be the same and nobody asked for the difference."""
    if "-h" in argv or "--help" in argv:
        print(HELP)
        return EXIT_DONE
    if own_rank() > 0:
        return _follow(argv)
    with App(argv) as app:
        run = _original(app)
        as_many_threads(run.environment)
        composition = again(app, run)
        given = {key for key, _ in map(split_override, app.overrides)}
    from xtuner_hydra import launch  # imports torch, which reads OMP_NUM_THREADS once

    prepared = launch.prepare(composition)
    data = prepared.data.describe()
    refuse_other_data(run, data, composition.config, given)
    for line in differences(run, data, prepared.ranks):
        print(f"not exactly the same: {printable(line)}", file=sys.stderr)
    return launch.start(prepared)


def _follow(argv: list[str]) -> int:
    """A rank that follows the first one under torchrun, which says what is wrong: take as many threads as that one does."""
    for word in argv:
        with suppress(OSError, ValueError):
            as_many_threads(json.loads((Path(word).expanduser() / "environment.json").read_text(encoding="utf-8")))
            break
    from xtuner_hydra import launch

    return launch.follow()


def again(app: App, run: Run) -> Composition:
    """`run` as a composition, with the overrides of `app`."""
    for override in app.overrides:
        if re.match(r"\+*sweep[.=]", override):
            raise RefusedError(f"{override}: a rerun is a single run, without a sweep")
    name = re.sub(r"^\d\d-\d\d-\d\d-\d+_", "", run.name)
    return recompose(app, _single(run), run.overrides, name, rerun_of=run.directory)


def differences(run: Run, data: dict[str, Any], ranks: int) -> Iterator[str]:
    """What cannot be the same as in `run`, a line each. `data`: the rerun's data.json; `ranks`: its number of ranks."""
    then, now = run.environment, environment([])
    for name in DECIDING:
        before, after = (part.get("versions", {}).get(name) for part in (then, now))
        if before != after:
            yield f"{name} {before or 'absent'} then, {after or 'absent'} now"
    yield from _code(then.get("git"), now["git"])
    for name in ("cpu", "gpus"):
        before, after = then.get("hardware", {}).get(name), now["hardware"][name]
        if before != after:
            yield f"{_device(name, before)} then, {_device(name, after)} now"
    if (before := then.get("ranks", ranks)) != ranks:
        yield f"{before} ranks then, {ranks} now"
    if "threads" not in then:
        yield "the number of CPU threads then is not recorded"
    for change in then.get("changes", []):
        yield f"{change}; now throughout"
    yield from _data(run.data, data)


def as_many_threads(environment: dict[str, Any]) -> None:
    """Take the number of threads that the run had: it decides in which order numbers are added up, and so their last bits."""
    if threads := environment.get("threads"):
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _original(app: App) -> Run:
    """The run that the first word names; the other words stay in `app.overrides`."""
    if app.is_sweep:
        raise RefusedError("rerun: repeats one run, so -m has no place here; train variants with python -m xtuner_hydra -m")
    args = app.args
    if args.cfg or args.info or args.hydra_help or args.shell_completion:
        raise RefusedError("rerun: takes RUN and overrides; the config of RUN is RUN/config.yaml")
    words = [word for word in app.overrides if "=" not in word or Path(word).is_dir()]
    if not words:
        raise RefusedError("rerun: name the directory of a run: xtuner-hydra rerun RUN [KEY=VALUE]...")
    app.overrides.remove(words[0])
    return load_run(words[0])


def _single(run: Run) -> Config:
    """The config of `run`, started by itself and from the start."""
    config = copy.deepcopy(run.config)
    config.sweep = SweepConfig()
    if config.checkpoint.resume == "auto":
        config.checkpoint.resume = "never"
    wandb = config.tracking.wandb
    if wandb.group == run.directory.parent.name:
        wandb.group = None
    if wandb.name == run.name:
        wandb.name = None
    return config


def refuse_other_data(run: Run, now: dict[str, Any], config: Config, given: set[str]) -> None:
    """DataError where files have another content than they had, unless they are `given` by an override."""
    for part, key, unchanged in (
        ("train", "data.path", config.data.path == run.config.data.path),
        ("eval", "data.eval_path", config.data.eval_path == run.config.data.eval_path),
    ):
        before, after = run.data.get(part), now[part]
        if unchanged and key not in given and before and after and (changes := _changes(before, after)):
            raise DataError(
                f"{key}: no longer what {run.directory} was made with: {'; '.join(changes)}. "
                f"Restore the data, or set {key}=... to use it as it is now"
            )


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What has become of the files of one part of data.json; empty where their contents are the same, whatever their names."""
    if before.get("hashes", after["hashes"]) == after["hashes"]:
        return []
    then, now = (dict(zip(part["files"], part["hashes"], strict=True)) for part in (before, after))
    changes = [f"{file} has changed" for file in then if now.get(file, then[file]) != then[file]]
    changes += [f"{file} is missing" for file in then if file not in now] + [f"{file} is new" for file in now if file not in then]
    return [*changes, f"{before['samples']} samples then, {after['samples']} now"]


def _data(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for part, name in (("train", "training data"), ("eval", "held-out data")):
        before, after = then.get(part), now[part]
        if part not in then or (before and "hashes" not in before):
            yield f"the content of the {name} then is not recorded"
        elif before and after and before["hashes"] == after["hashes"] and before["fingerprint"] != after["fingerprint"]:
            yield f"the {name} is read differently: by another format, tokenizer or version of these"


def _code(then: dict[str, Any] | None, now: dict[str, Any] | None) -> Iterator[str]:
    before, after = (part["commit"][:12] if part else None for part in (then, now))
    if before != after:
        yield f"{f'commit {before}' if before else 'no git repository'} then, {f'commit {after}' if after else 'no git repository'} now"
    elif then and now and then["diff"] != now["diff"]:
        yield "other uncommitted changes then than now (environment.json holds them; see xtuner-hydra diff)"


def _device(name: str, value: Any) -> str:
    if name == "gpus":
        return ", ".join(value) if value else "no GPU"
    return str(value or "an unknown CPU")
