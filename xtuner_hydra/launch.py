"""From a composed config to workers: everything that can reject the run, then the run directory, then the ranks.

`prepare` creates nothing but caches (tokens, weights from the Hub), and renames back a checkpoint that a crash had set aside; `create`
makes the run directory; ranks.py trains it. Under torchrun rank 0 prepares and publishes the run directory through the
rendezvous store, and every rank trains in its own process."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import MISSING

from xtuner_hydra import run_dir as run_dirs
from xtuner_hydra.checkpoint import resume, state
from xtuner_hydra.checkpoint.commit import step_of
from xtuner_hydra.config.checks import check, data_parallel_size
from xtuner_hydra.config.composition import Composition
from xtuner_hydra.config.schema import Config
from xtuner_hydra.config.strict import changed
from xtuner_hydra.cost import Sizes, count_parameters
from xtuner_hydra.data.prepare import PreparedData, refuse_ids_without_a_row
from xtuner_hydra.data.prepare import prepare as prepare_data
from xtuner_hydra.data.prompts import sample_prompts
from xtuner_hydra.data.tokenizers import Tokenizer, load_tokenizer
from xtuner_hydra.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, RefusedError, Stopped
from xtuner_hydra.files import write_json
from xtuner_hydra.machine import started_by_torchrun
from xtuner_hydra.model.hub import local_directory
from xtuner_hydra.model.pretrained import check_pretrained, refuse_other_settings
from xtuner_hydra.parallel.compiling import choose_compile
from xtuner_hydra.parallel.runtime import device_type, param_dtype, ranks_here, refuse_missing_gpus, world_size
from xtuner_hydra.ranks import start_ranks, train_here
from xtuner_hydra.results.glance import progress
from xtuner_hydra.room import refuse_full_disk, warn_of_memory
from xtuner_hydra.stopping import Stopping
from xtuner_hydra.tracking.environment import environment
from xtuner_hydra.tracking.wandb import resolve_mode

_WAIT = timedelta(days=1)  # for rank 0 to tokenise a large data set; torchrun ends the wait if rank 0 dies


@dataclass(frozen=True)
class Prepared:
    """A run that passed all checks: resolved config, data, and the checkpoint it will continue from. began: seconds since the epoch."""

    composition: Composition
    config: Config
    ranks: int
    data: PreparedData
    tokenizer: Tokenizer
    sizes: Sizes
    checkpoint: Path | None
    began: float

    @property
    def is_done(self) -> bool:
        """True if the run to be resumed has reached its last step."""
        if self.config.checkpoint.resume != "auto":
            return False
        status = run_dirs.read_status(self.composition.run_dir)
        return bool(status.get("state") == "completed" and status.get("step", -1) >= self.data.plan.total_steps)


def prepare(composition: Composition, *, progress: bool = True, elsewhere: bool = False) -> Prepared:
    """Resolve, check and read everything that a run needs; raises RefusedError. Creates nothing but caches.

    elsewhere: the run will be on another machine, whose devices are not known here."""
    began = time.time()
    config = composition.config
    if elsewhere and config.parallelism.nproc_per_node is None:
        raise ConfigError("parallelism.nproc_per_node", None, "must be a number where the job runs on another machine")
    ranks = world_size(config.parallelism, config.trainer.device)
    check(config, ranks)
    if not elsewhere:
        refuse_missing_gpus(config.trainer.device, ranks)
    run_dirs.refuse_unusable(composition.run_dir, resuming=config.checkpoint.resume == "auto")
    if config.model.pretrained is not None:
        config.model.pretrained = str(local_directory(config.model.pretrained).resolve())
    check_pretrained(config.model)
    refuse_other_settings(config.model, composition.overrides)
    sizes = count_parameters(config)  # rejects targets and patterns that match nothing
    if config.tracking.wandb.enabled:
        resolve_mode(config.tracking.wandb)  # an online run needs a key
    checkpoint = resume.find(config.checkpoint, composition.run_dir)
    if checkpoint is not None:
        run_dirs.refuse_stray(checkpoint, home=checkpoint.parent.parent)
        run_dirs.refuse_stray(checkpoint, trees=None)
    resolve(config, ranks)
    if not elsewhere:
        config.parallelism.param_dtype = param_dtype(config.parallelism.param_dtype, config.trainer.device)
    if config.checkpoint.resume not in ("auto", "never"):
        config.checkpoint.resume = str(checkpoint)
    tokenizer = load_tokenizer(config.model)
    sample_prompts(config, tokenizer)  # rejects prompts that cannot be used
    data = prepare_data(config, tokenizer, progress=progress)
    refuse_ids_without_a_row((data.train, data.eval), config.model.vocab_size, tokenizer)
    if config.parallelism.compile == "true" and not elsewhere:
        choose_compile(config, device_type(config.trainer.device), ranks, data.plan.expected_tokens)  # rejects a run without a compiler
    if checkpoint is not None:
        now = state.trajectory(config, data.train.cache.fingerprint)
        resume.refuse_other_trajectory(checkpoint, now, config.checkpoint.allow_change)
    prepared = Prepared(composition, config, ranks, data, tokenizer, sizes, checkpoint, began)
    if not prepared.is_done:
        if checkpoint is not None:
            resume.refuse_beyond(checkpoint, data.plan.total_steps)
        elif config.checkpoint.resume == "auto":
            _refuse_completed(composition.run_dir)
        if not elsewhere and device_type(config.trainer.device) == "cpu":
            warn_of_memory(sizes, ranks // config.parallelism.dp_replicate, ranks_here(ranks))
    return prepared


def _refuse_completed(directory: Path) -> None:
    """RefusedError for a run that has completed and cannot be continued: starting over would overwrite its results."""
    status = run_dirs.read_status(directory)
    if status.get("state") == "completed":
        raise RefusedError(
            f"checkpoint.resume=auto: the run in {directory} has completed {status.get('step')} steps and kept no checkpoint to continue from. "
            "Choose another directory"
        )


def resolve(config: Config, ranks: int) -> None:
    """Replace, in place, values left to the machine by what they are here, so that config.yaml repeats this run elsewhere."""
    if config.trainer.global_batch_size is None:
        config.trainer.global_batch_size = data_parallel_size(config, ranks)
    config.parallelism.nproc_per_node = ranks_here(ranks)
    config.data.path = _absolute(config.data.path)
    config.data.eval_path = _absolute(config.data.eval_path)
    config.data.cache_dir = _absolute(config.data.cache_dir)
    for source in config.data.sources or []:
        source.path = _absolute(source.path)
    if config.model.tokenizer is None and config.model.pretrained is None:
        config.model.tokenizer = "byte"
    if (tokenizer := config.model.tokenizer) is not None and tokenizer != "byte" and Path(tokenizer).expanduser().is_dir():
        config.model.tokenizer = str(Path(tokenizer).expanduser().resolve())
    if (template := config.model.chat_template) is not None and template.endswith(".jinja"):
        config.model.chat_template = str(Path(template).expanduser().resolve())


def _absolute(path: Any) -> Any:
    """Files, directories and globs, one or a list, relative to this working directory; what is not a path (null, ???) unchanged."""
    if isinstance(path, list):
        return [_absolute(one) for one in path]
    return os.path.abspath(os.path.expanduser(path)) if isinstance(path, str) and path != MISSING else path


def run(composition: Composition) -> int:
    """Prepare and train; returns the exit code. Raises Stopped on a signal while data is prepared."""
    stopping = Stopping()
    with stopping.listening():
        with stopping.heeding():
            prepared = prepare(composition)
        stopping.heed()
    return start(prepared)


def start(prepared: Prepared) -> int:
    """Train what has been prepared; returns the exit code. Raises Stopped on a signal before there is anything to save."""
    stopping = Stopping()
    with stopping.listening():
        try:
            with stopping.heeding():
                return _start(prepared, stopping)
        except Stopped as stop:
            mark_stopped(prepared.composition.run_dir, stop)
            raise
        except KeyboardInterrupt:
            mark_stopped(prepared.composition.run_dir, Stopped("interrupted twice (Ctrl-C): stopped at once", EXIT_INTERRUPTED))
            raise


def mark_stopped(directory: Path, stop: Stopped) -> None:
    """Record in status.json, if this process has started the run, that it was stopped before its ranks could do so."""
    status = run_dirs.read_status(directory)
    if status.get("state") == "running" and status.get("process") == run_dirs.this_process():
        run_dirs.record_end(directory, "interrupted", exit_code=stop.exit_code, error=str(stop), **progress(directory))


def _start(prepared: Prepared, stopping: Stopping) -> int:
    directory = prepared.composition.run_dir
    if prepared.is_done:
        print(f"{directory}: this run is complete ({run_dirs.read_status(directory)['step']} steps); nothing to do")
        if started_by_torchrun():
            publish({"exit_code": EXIT_DONE})
        return EXIT_DONE
    refuse_no_room(prepared)
    with run_dirs.alone_in(directory, patience=run_dirs.DYING_SECONDS):
        with stopping.holding():
            create(prepared)
        if started_by_torchrun():
            publish({"run_dir": str(directory)})
            return train_here(directory)
        return start_ranks(directory, prepared.ranks)


def refuse_no_room(prepared: Prepared) -> None:
    """RefusedError where the run's disk is too full for a checkpoint. Not part of `prepare`: `plan` may be asked on another machine."""
    refuse_full_disk(prepared.config, prepared.composition.run_dir, prepared.sizes, prepared.data.plan.total_steps)


def create(prepared: Prepared) -> None:
    """Make the run directory with everything that workers read."""
    composition, directory = prepared.composition, prepared.composition.run_dir
    progress = {"step": step_of(prepared.checkpoint) if prepared.checkpoint else 0, "total_steps": prepared.data.plan.total_steps}
    # once more: another run may have started here while the data was prepared
    run_dirs.refuse_unusable(directory, resuming=prepared.config.checkpoint.resume == "auto")
    run_dirs.create(directory, prepared.config, composition.overrides, _environment(prepared), **progress)
    with run_dirs.writing(directory):
        write_json(directory / "changed.json", changed_here(prepared))
        prepared.data.save(directory)


def changed_here(prepared: Prepared) -> dict[str, tuple[Any, Any]]:
    """Key -> [default, value] of what differs from a run without overrides on this machine."""
    default = copy.deepcopy(prepared.composition.defaults())
    dtype = prepared.config.parallelism.param_dtype
    if dtype != "auto":  # first, as this run's device decides what an automatic dtype is
        default.parallelism.param_dtype = param_dtype(default.parallelism.param_dtype, prepared.config.trainer.device)
    resolve(default, prepared.ranks)
    return changed(prepared.config, default)


def _environment(prepared: Prepared) -> dict[str, Any]:
    composition, origin = prepared.composition, prepared.composition.rerun_of
    more = {"started": prepared.began, "options": composition.choices}
    return environment(sys.argv) | more | ({"rerun_of": str(origin)} if origin else {})


def publish(message: dict[str, object]) -> None:
    """Rank 0 under torchrun: tell the other ranks the run directory, or that there is nothing to do and with which code to exit."""
    _store().set(_key(_attempt()), json.dumps(message))


def follow() -> int:
    """The other ranks under torchrun: wait for rank 0's message and do as it says. They never compose."""
    store = _store()
    store.wait([_key(_attempt())], _WAIT)
    message = json.loads(store.get(_key(_attempt())))
    if "run_dir" not in message:
        return int(message["exit_code"])
    return train_here(Path(message["run_dir"]), restarted=_attempt() > 0)


def continue_after_crash() -> int | None:
    """Rank 0 restarted by torchrun: continue the run that the previous attempt had started; None if it had not started one."""
    store, before = _store(), _key(_attempt() - 1)
    if not store.check([before]) or "run_dir" not in (message := json.loads(store.get(before))):
        return None
    publish(message)
    directory = Path(message["run_dir"])
    with run_dirs.alone_in(directory, patience=run_dirs.DYING_SECONDS):
        return train_here(directory, restarted=True)


def _store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("xtuner_hydra", store)


def _attempt() -> int:
    """How often torchrun has restarted the ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _key(attempt: int) -> str:
    return f"run-{attempt}"
