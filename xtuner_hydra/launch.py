"""From a composed config to workers: everything that can refuse, then the run directory, then the ranks.

`prepare` creates nothing but the token cache. `run` trains one composition:
    one rank                 inside this process
    nproc_per_node ranks     worker processes under torch's elastic launcher
    under torchrun           rank 0 prepares and publishes the run directory through the rendezvous store; every rank trains in its own process"""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from xtuner_hydra import run_dir as run_dirs
from xtuner_hydra.app import Composition
from xtuner_hydra.checkpoint import state
from xtuner_hydra.checkpoint.commit import step_of
from xtuner_hydra.config.checks import check, data_parallel_size
from xtuner_hydra.config.schema import Config
from xtuner_hydra.data.prepare import PreparedData, refuse_ids_without_a_row
from xtuner_hydra.data.prepare import prepare as prepare_data
from xtuner_hydra.data.tokenizers import Tokenizer, load_tokenizer
from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED
from xtuner_hydra.model.families import check_pretrained
from xtuner_hydra.parallel.runtime import param_dtype, started_by_torchrun, world_size
from xtuner_hydra.tracking.environment import environment
from xtuner_hydra.tracking.wandb import resolve_mode

log = logging.getLogger("xtuner_hydra")
_WAIT = timedelta(days=1)  # for rank 0 to tokenise a large data set; torchrun ends the wait if rank 0 dies


@dataclass(frozen=True)
class Prepared:
    """A run that nothing speaks against: resolved config, data, and the checkpoint it will continue from."""

    composition: Composition
    config: Config
    ranks: int
    data: PreparedData
    tokenizer: Tokenizer
    checkpoint: Path | None

    @property
    def is_done(self) -> bool:
        """True where the run to be resumed has reached its last step."""
        if self.config.checkpoint.resume != "auto":
            return False
        status = run_dirs.read_status(self.composition.run_dir)
        done_by_status = status.get("state") == "completed" and status.get("step", -1) >= self.data.plan.total_steps
        return done_by_status or (self.checkpoint is not None and step_of(self.checkpoint) >= self.data.plan.total_steps)


def prepare(composition: Composition, *, progress: bool = True) -> Prepared:
    """Resolve, check and read all that a run needs; raises RefusedError. Creates nothing but the token cache."""
    config = composition.config
    ranks = world_size(config.parallelism, config.trainer.device)
    check(config, ranks)
    run_dirs.refuse_unusable(composition.run_dir, resuming=config.checkpoint.resume == "auto")
    check_pretrained(config.model)
    if config.tracking.wandb.enabled:
        resolve_mode(config.tracking.wandb)  # an online run needs a key
    checkpoint = state.find(config.checkpoint, composition.run_dir)
    resolve(config, ranks)
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer, progress=progress)
    refuse_ids_without_a_row(data, config.model.vocab_size, tokenizer)
    if checkpoint is not None:
        state.refuse_other_trajectory(checkpoint, state.trajectory(config, data.plan.fingerprint))
    return Prepared(composition, config, ranks, data, tokenizer, checkpoint)


def resolve(config: Config, ranks: int) -> None:
    """Replace, in place, what was left to the machine by what it is here, so that config.yaml repeats this run elsewhere."""
    config.parallelism.param_dtype = param_dtype(config.parallelism.param_dtype, config.trainer.device)
    if config.trainer.global_batch_size is None:
        config.trainer.global_batch_size = data_parallel_size(config, ranks)
    if config.model.pretrained is not None:
        config.model.pretrained = str(Path(config.model.pretrained).resolve())
    if (tokenizer := config.model.tokenizer) is not None and tokenizer != "byte" and Path(tokenizer).expanduser().is_dir():
        config.model.tokenizer = str(Path(tokenizer).expanduser().resolve())
    if (template := config.model.chat_template) is not None and template.endswith(".jinja"):
        config.model.chat_template = str(Path(template).expanduser().resolve())


def run(composition: Composition, *, isolated: bool = False) -> int:
    """Prepare and train; returns the exit code. `isolated`: in a process of its own even for one rank."""
    prepared = prepare(composition)
    directory = composition.run_dir
    if prepared.is_done:
        print(f"{directory}: this run is complete ({prepared.data.plan.total_steps} steps); nothing to do")
        if started_by_torchrun():
            publish({"exit_code": EXIT_DONE})
        return EXIT_DONE
    run_dirs.create(directory, prepared.config, composition.overrides, environment(sys.argv))
    prepared.data.save(directory)
    if started_by_torchrun():
        publish({"run_dir": str(directory)})
    if started_by_torchrun() or (prepared.ranks == 1 and not isolated):
        from xtuner_hydra.worker import train

        return train(directory)
    return start_workers(directory, prepared.ranks)


def start_workers(directory: Path, ranks: int) -> int:
    """Run `ranks` workers to their end; the exit code, with the first failing rank's error on screen and in status.json."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # says again, at length, what `_explain` says
    for stale in (directory / "logs").glob("*.error.json"):
        stale.unlink()
    try:
        elastic_launch(config, sys.executable)("-m", "xtuner_hydra.worker", str(directory))
    except ChildFailedError as error:
        return _explain(directory, error)
    except (SignalException, KeyboardInterrupt):
        if run_dirs.read_status(directory).get("state") == "running":
            run_dirs.write_status(directory, "interrupted", exit_code=EXIT_INTERRUPTED, error="interrupted (Ctrl-C or SIGTERM)")
        return EXIT_INTERRUPTED
    return EXIT_DONE


def _explain(directory: Path, error: ChildFailedError) -> int:
    """The first cause among the ranks that failed: one that was killed, else the one that failed first."""
    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if EXIT_INTERRUPTED in codes.values():
        return EXIT_INTERRUPTED
    causes = [json.loads(path.read_text(encoding="utf-8")) for path in (directory / "logs").glob("*.error.json")]
    # the launcher ends the others with SIGTERM (-15), or SIGKILL after a grace; only a rank that never wrote its error was struck itself
    told = {cause["rank"] for cause in causes}
    struck = {rank: code for rank, code in codes.items() if code < 0 and code != -15 and rank not in told}
    if struck:
        rank, code = min(struck.items())
        text, details = f"rank {rank} was killed by signal {-code}{' (out of memory?)' if code == -9 else ''}", ""
    elif causes:
        first = min(causes, key=lambda cause: cause["time"])
        rank, text, details = first["rank"], first["error"], first["traceback"]
    else:
        rank, code = min(codes.items())
        text, details = f"exited with code {code}", ""
    text = text if struck else f"rank {rank}: {text}"
    print(f"training failed: {text}\n{details}(log: {directory / 'logs' / f'rank{rank}.log'})", file=sys.stderr)
    code = EXIT_REFUSED if codes.get(rank) == EXIT_REFUSED else EXIT_FAILED
    before = run_dirs.read_status(directory)
    kept = {key: before[key] for key in ("step", "total_steps", "metrics") if key in before}
    run_dirs.write_status(directory, "failed", exit_code=code, error=text, **kept)
    return code


def publish(message: dict[str, object]) -> None:
    """Rank 0 under torchrun: tell the other ranks the run directory, or that there is nothing to do and with which code to exit."""
    _store().set(_key(), json.dumps(message))


def follow() -> int:
    """The other ranks under torchrun: wait for rank 0's message and do as it says. They never compose."""
    store = _store()
    store.wait([_key()], _WAIT)
    message = json.loads(store.get(_key()))
    if "run_dir" not in message:
        return int(message["exit_code"])
    from xtuner_hydra.worker import train

    return train(Path(message["run_dir"]))


def _store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore("xtuner_hydra", store)


def _key() -> str:
    return f"run-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
