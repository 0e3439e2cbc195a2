"""One rank of a run: reads the run directory, builds everything, trains, and records how it ended.

A worker never sees Hydra. `train` is the same for a rank in its own process and for a single rank inside the Hydra process."""

from __future__ import annotations

import logging
import os
import re
import time
import traceback
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from xtuner_hydra.build import build_engine
from xtuner_hydra.checkpoint.commit import has_saved
from xtuner_hydra.config.checks import idle
from xtuner_hydra.config.names import as_typed
from xtuner_hydra.config.schema import Config
from xtuner_hydra.data.prepare import PreparedData
from xtuner_hydra.data.show import first_sample
from xtuner_hydra.data.tokenizers import load_tokenizer
from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, RefusedError, Stopped, TrainingError
from xtuner_hydra.files import write_json
from xtuner_hydra.garbage import collect_as_usual
from xtuner_hydra.machine import own_rank
from xtuner_hydra.metrics import Row
from xtuner_hydra.optim.schedules import cut_short
from xtuner_hydra.parallel import allocator
from xtuner_hydra.parallel.compiling import Choice, choose_compile
from xtuner_hydra.parallel.runtime import Runtime, runtime
from xtuner_hydra.parallel.watchdog import Watchdog
from xtuner_hydra.pointwise import compile_pointwise
from xtuner_hydra.reports.pictures import loss_png
from xtuner_hydra.reports.run import write_run
from xtuner_hydra.results.glance import progress
from xtuner_hydra.run_dir import note, read_config, read_environment, read_overrides, record_end, write_status
from xtuner_hydra.safe_text import redacted
from xtuner_hydra.stopping import Stopping, Wish, ignore_signals
from xtuner_hydra.tracking import build_trackers
from xtuner_hydra.tracking.console import setup_logging
from xtuner_hydra.tracking.jsonl import read
from xtuner_hydra.trainer import Trainer
from xtuner_hydra.words import counted

log = logging.getLogger("xtuner_hydra")


def train(run_dir: Path, *, traceback_on_screen: bool = True, restarted: bool = False) -> int:
    """Train the run of `run_dir` on this rank; returns the exit code. The first rank writes to status.json how the run ended.

    restarted: continue from the run's own newest checkpoint, if it has one, whatever checkpoint.resume says."""
    rank = own_rank()
    setup_logging(run_dir, rank, terminal=rank == 0)
    trainer: Trainer | None = None
    final: dict[str, Any] = {}
    code = EXIT_FAILED
    stopping = Stopping()
    with stopping.listening():
        try:
            with stopping.heeding():
                config = read_config(run_dir)
                if restarted and has_saved(run_dir / "checkpoints"):
                    config.checkpoint.resume = "auto"
                stopping.deadline = deadline(config, run_dir)
                with runtime(config) as place:
                    trainer = build(config, run_dir, place, stopping)
                    with closing(trainer.saver):
                        with_trackers(trainer)
                        collect_as_usual()
                        with watchdog(config, run_dir, place, stopping):
                            trainer.fit()
            code, final = EXIT_DONE, {"state": "completed"}
        except Stopped as stop:
            ignore_signals()
            code, final = stop.exit_code, {"state": "interrupted", "error": str(stop)}
            log.warning(f"{stop}; {_how_to_go_on(run_dir)}")
        except KeyboardInterrupt:
            ignore_signals()
            code, final = EXIT_INTERRUPTED, _at_once()
        except RefusedError as error:
            ignore_signals()
            code, final = EXIT_REFUSED, {"state": "failed", "error": str(error)}
            _report_failure(run_dir, rank, str(error), details="", on_screen=traceback_on_screen)
        except Exception as error:
            ignore_signals()
            if _was_interrupted(stopping, error):
                log.error(traceback.format_exc(), extra={"file_only": True})  # should it be another error after all
                code, final = EXIT_INTERRUPTED, _at_once()
            else:
                final = _failed(run_dir, rank, error, on_screen=traceback_on_screen)
        ignore_signals()
        if rank == 0:
            _finish(run_dir, trainer, {"exit_code": code, **final})
    return code


def _at_once() -> dict[str, Any]:
    reason = "interrupted twice (Ctrl-C): stopped at once"
    log.warning(reason)
    return {"state": "interrupted", "error": reason}


def _was_interrupted(stopping: Stopping, error: Exception) -> bool:
    """Whether `error` follows from a second Ctrl-C: a library may have turned the KeyboardInterrupt into an error of its own, and a rank may have
    lost another one that stopped at once."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return stopping.at_once or (several and stopping.wish == Wish.INTERRUPTED and not isinstance(error, TrainingError))


def _failed(run_dir: Path, rank: int, error: Exception, *, on_screen: bool) -> dict[str, Any]:
    if _is_out_of_memory(error):
        log.error(traceback.format_exc(), extra={"file_only": True})
        error = TrainingError(
            f"out of memory ({str(error).strip().splitlines()[-1]}). Shorter packs (data.pack_max_length), parallelism.recompute_ratio=1, more "
            "ranks or a smaller model take less; `plan` says what weights, gradients and moments take"
        )
    expected = isinstance(error, TrainingError)
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    _report_failure(run_dir, rank, text, "" if expected else traceback.format_exc(), on_screen=on_screen)
    return {"state": "failed", "error": text}


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _how_to_go_on(run_dir: Path) -> str:
    resume = read_config(run_dir).checkpoint.resume
    if has_saved(run_dir / "checkpoints"):
        return f"continue with checkpoint.resume=auto {as_typed('hydra.run.dir', run_dir)}"
    if resume not in ("auto", "never"):
        return f"nothing new was saved: continue with checkpoint.resume={resume} in a new directory"
    return "no checkpoint was saved: checkpoint.resume=auto would start at step 0"


def watchdog(config: Config, run_dir: Path, place: Runtime, stopping: Stopping) -> Watchdog:
    """Ends all ranks if one hangs."""

    def tell(rank: int, error: str, stack: str) -> None:
        _report_failure(run_dir, rank, error, stack, on_screen=False)
        record_end(run_dir, "failed", exit_code=EXIT_FAILED, error=error, **progress(run_dir))

    return Watchdog(run_dir / "logs", place.rank, place.world_size, config.parallelism.timeout, lambda: stopping.edges, tell)


def deadline(config: Config, run_dir: Path) -> float | None:
    """When the run must have ended, in seconds since the epoch, by trainer.max_seconds after its command began; None: never."""
    if config.trainer.max_seconds is None:
        return None
    return read_environment(run_dir)["started"] + config.trainer.max_seconds


def build(config: Config, run_dir: Path, place: Runtime, stopping: Stopping) -> Trainer:
    """Data, engine and trainer of this rank."""
    tokenizer = load_tokenizer(config.model)
    data = PreparedData.load(run_dir, config)
    compiled = choose_compile(config, place.device.type, place.world_size, data.plan.expected_tokens)
    compile_pointwise(compiled.enabled)
    trainer = Trainer(config, run_dir, place, data, tokenizer, build_engine(config, place), stopping)
    _tell(trainer, compiled)
    return trainer


def with_trackers(trainer: Trainer) -> None:
    """Resume if the config says so, then open the trackers (on the first rank) at the step where metrics continue."""
    step = trainer.resume_if_possible()
    if trainer.runtime.rank == 0:
        config = trainer.config
        write_status(trainer.run_dir, "running", step=step or 0, total_steps=trainer.total_steps)  # by the process that trains
        trainer.trackers = build_trackers(
            config.tracking,
            trainer.run_dir,
            resolved=asdict(config),
            overrides=read_overrides(trainer.run_dir),
            total_steps=trainer.total_steps,
            start_step=step or 0,
            evaluated=bool(trainer.state.evaluation),
            sampled=trainer.state.sampled,
            samples=bool(config.trainer.sample_prompts),
        )
        for row in read(trainer.run_dir / "metrics.jsonl"):  # so that a run with nothing left to do has its last metrics too
            trainer.metrics |= row
        note(trainer.run_dir, threads=torch.get_num_threads(), ranks=trainer.runtime.world_size, changes=trainer.state.changes)


def _tell(trainer: Trainer, compiled: Choice) -> None:
    """What is about to be trained, in XTuner's order: data, model, parameters, accumulation."""
    for line in [*trainer.data.summary(), first_sample(trainer.data, trainer.tokenizer)]:
        log.info(line)
    model = trainer.engine.model
    log.info(f"model:\n{model}")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    count, trainable = (sum(map(torch.Tensor.numel, parameters)) for parameters in (model.parameters(), trained.values()))
    log.info(f"parameters: {count / 1e6:.2f} M, trainable: {trainable / 1e6:.2f} M")
    log.info("trainable: " + ", ".join(_ranges(list(trained))))
    if trainer.runtime.device.type == "cpu":
        log.info("malloc: " + (allocator.active() or f"the system's; {allocator.advice()}"))
        log.info(f"on huge pages: {allocator.pages()}")
    log.info(f"torch.compile: {compiled.why}")
    for sentence in [*idle(trainer.config), *cut_short(trainer.config.scheduler, trainer.total_steps)]:
        log.warning(sentence)
    place, batch = trainer.runtime, trainer.config.trainer.global_batch_size or trainer.runtime.world_size
    log.info(
        f"{counted(place.world_size, 'rank')} on {place.device.type}, compute in {trainer.config.parallelism.param_dtype}; "
        f"{counted(batch, 'pack')} per step, gradient accumulation steps: {batch // place.world_size}; {counted(trainer.total_steps, 'step')}"
    )


def _ranges(names: list[str]) -> list[str]:
    """Parameter names with the layers' numbers folded: model.layers.[0-2,5].mlp.up_proj.weight."""
    folded: dict[str, list[int]] = {}
    for name in names:
        numbers = re.findall(r"\.(\d+)\.", name)
        folded.setdefault(re.sub(r"\.\d+\.", ".[#].", name), []).extend(map(int, numbers))
    return [name.replace("#", _runs(numbers)) for name, numbers in folded.items()]


def _runs(numbers: list[int]) -> str:
    """0-2,5 for 0, 1, 2 and 5."""
    edges: list[list[int]] = []
    for number in sorted(numbers):
        if edges and number == edges[-1][1] + 1:
            edges[-1][1] = number
        else:
            edges.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in edges)


def _report_failure(run_dir: Path, rank: int, text: str, details: str, *, on_screen: bool) -> None:
    """The cause first, then the traceback. If other ranks fail as a consequence, the launcher shows only the first cause."""
    if not on_screen:
        told = {"rank": rank, "time": time.time(), "error": text, "traceback": details}
        try:
            write_json(run_dir / "logs" / f"rank{rank}.error.json", redacted(told))
        except OSError:  # a full disk: the launcher will find nothing to show
            on_screen = True
    extra = {} if on_screen else {"file_only": True}
    log.error(f"training failed: {text}", extra=extra)
    if details:
        log.error(details, extra=extra)


def _finish(run_dir: Path, trainer: Trainer | None, final: dict[str, Any]) -> None:
    """Close the trackers, write the last status, then the report."""
    before = progress(run_dir)
    metrics: Row = (trainer.metrics if trainer else {}) or before.get("metrics", {})
    step = (trainer.state.step if trainer else 0) or before.get("step", 0)  # stopped before it had read its checkpoint
    total = trainer.total_steps if trainer else before.get("total_steps")
    if trainer:
        trainer.trackers.finish(final["state"], final["exit_code"])
    record_end(run_dir, **final, step=step, total_steps=total, metrics=metrics)
    _report(run_dir)
    log.info(f"{final['state']} at step {step}: {run_dir}")


def _report(run_dir: Path) -> None:
    """loss.png and report.html. A failure to draw them must not fail the run."""
    for write in (loss_png, write_run):
        try:
            write(run_dir)
        except Exception as error:
            log.warning(f"{write.__name__} failed, the run is not affected: {type(error).__name__}: {error}")
