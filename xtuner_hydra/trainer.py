"""The training loop. `fit` reads from top to bottom; a step is defined in engine.py, a checkpoint in checkpoint/."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import torch.distributed as dist

from xtuner_hydra.checkpoint import export, resume, state
from xtuner_hydra.checkpoint.commit import damage
from xtuner_hydra.checkpoint.saver import Saver
from xtuner_hydra.checkpoint.state import Snapshot, TrainState
from xtuner_hydra.config.schema import Config
from xtuner_hydra.data.changes import changed_files
from xtuner_hydra.data.loader import StepBatch, eval_batches, train_batches
from xtuner_hydra.data.prepare import PreparedData
from xtuner_hydra.data.prompts import sample_prompts
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.engine import Engine
from xtuner_hydra.errors import Stopped, TrainingError
from xtuner_hydra.files import sync
from xtuner_hydra.metrics import Meter, Row, evaluation
from xtuner_hydra.model.flops import training_flops
from xtuner_hydra.optim.schedules import is_stable, learning_rate
from xtuner_hydra.parallel.device import peak_flops
from xtuner_hydra.parallel.profiling import Profiler
from xtuner_hydra.parallel.runtime import DTYPES, Runtime, patience
from xtuner_hydra.stopping import Stopping
from xtuner_hydra.tracking.base import Sample, Trackers

SLOW_DISK = 100e6
"""Bytes per second that any rank can save."""
ENDING_SECONDS = 5.0
"""Seconds reserved for closing the trackers and writing the report."""

log = logging.getLogger("xtuner_hydra")


class Trainer:
    """One run on one rank: data in, steps, metrics, evaluations and checkpoints out. `trackers` is empty on all ranks but the first."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        runtime: Runtime,
        data: PreparedData,
        tokenizer: Tokenizer,
        engine: Engine,
        stopping: Stopping,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.runtime = runtime
        self.data = data
        self.tokenizer = tokenizer
        self.engine = engine
        self.stopping = stopping
        self.trackers = Trackers()
        self.total_steps = data.plan.total_steps
        self.state = TrainState(schedule_steps=self.total_steps)
        self.rng = state.rng_state()
        self.trajectory = state.trajectory(config, data.train.cache.fingerprint)
        guess = engine.state_bytes() / SLOW_DISK
        self.saver = Saver(run_dir / "checkpoints", config.checkpoint, patience(config.parallelism), guess)
        # measured now: in `fit` W&B starts at the same time, and a peak measured on half a machine would give an mfu above 1
        self.peak_flops = peak_flops(runtime.device, DTYPES[config.parallelism.param_dtype])
        self.profiler = Profiler(run_dir, config.trainer.profile_steps if runtime.rank == 0 else 0)
        self.metrics: Row = {}
        self.exported: int | None = None
        self.told_of_changes = False

    def resume_if_possible(self) -> int | None:
        """Continue from the checkpoint that the config names; the step it was taken after, or None."""
        found = [resume.find(self.config.checkpoint, self.run_dir) if self.runtime.rank == 0 else None]
        dist.broadcast_object_list(found)  # one rank reads all of it to check for damage
        checkpoint = found[0]
        if checkpoint is None:
            return None
        self.state = state.load(checkpoint, self.engine.model, self.engine.optimizers)
        self.rng = state.rng_state()
        of_this_step = self.run_dir / "hf" / f"step-{self.state.step}"
        exported = [damage(of_this_step) is None]
        dist.broadcast_object_list(exported)
        if exported[0]:
            export.finish(of_this_step, self.config.checkpoint.hf_keep)
        is_own = checkpoint.resolve().parent == self.saver.directory.resolve()
        self.saver.step = self.state.step if is_own else None  # a new directory does not hold it yet
        self.metrics |= self.state.evaluation
        self.exported = self.state.step if exported[0] else None
        log.info(f"resumed from {checkpoint}: step {self.state.step}/{self.total_steps}, {self.state.tokens} tokens seen")
        self.note_changes(checkpoint, is_own)
        self.reconcile_schedule()
        return self.state.step

    def note_changes(self, checkpoint: Path, is_own: bool) -> None:
        """Note what a rerun will not repeat: it begins as this run began, from another run's checkpoint if that is how, with its last settings."""
        if not is_own:
            self.state.changes = []
            return
        self.state.changes += resume.changes(checkpoint, self.trajectory)
        if (before := self.state.schedule_steps) != self.total_steps:
            self.state.changes.append(f"the end was step {before} until {checkpoint.name}, and is step {self.total_steps} from there on")

    def reconcile_schedule(self) -> None:
        """A lengthened run keeps its schedule and then its last learning rate, so that the rate never rises again; if `wsd` is between warm-up and
        decay, the decay moves to the new end instead. A shortened run decays sooner."""
        before, now = self.state.schedule_steps, self.total_steps
        if now > before and all(is_stable(self.config.scheduler, self.state.step, total) for total in (before, now)):
            log.info(f"the run continues to step {now}: the learning rate has not begun to decay, and will do so at the new end")
            self.state.schedule_steps = now
        elif now > before:
            rate = learning_rate(self.config.scheduler, before, before, self.config.optimizer.lr)
            log.warning(
                f"the run continues to step {now}, its schedule was made for {before}: the learning rate stays at its final value, {rate:.3g}, "
                "whatever optimizer.lr is"
            )
        elif now < before:
            log.warning(f"the run now ends at step {now}, its schedule was made for {before}: the learning rate decays sooner")
            self.state.schedule_steps = now

    def fit(self) -> Row:
        """Train to the end of the plan; returns the last metrics.

        Raises Stopped, after a save, if the run is asked to end early, and TrainingError if training cannot continue."""
        trained = {name for name, parameter in self.engine.model.named_parameters() if parameter.requires_grad}
        self.meter = Meter(self.runtime, training_flops(self.config.model, trained), self.peak_flops)
        self.engine.at_edge = self.stopping.check
        self.stopping.reserve = lambda: self.saver.expected_seconds() + ENDING_SECONDS
        self.stopping.save_failed = self.saver.failed
        self.stopping.begin_training()
        try:
            if self.state.step > 0:
                self.complete_step()  # finishes what an earlier process may have left undone
                if self.saver.step is None and self.config.checkpoint.interval is not None:
                    self.save_last_step("the run continues in a new directory")  # otherwise a crash would lead back to step 0
            for batch in self.batches():
                self.profiler.begin()
                self.train(batch)
                self.profiler.end()
                self.complete_step()
            self.saver.wait()
        except Stopped as stop:
            self.save_last_step(str(stop))
            self.profiler.close()
            raise
        self.profiler.close()
        self.warn_of_changed_data()
        return self.metrics

    def complete_step(self) -> None:
        """Do whatever is due after the step just taken and not done yet."""
        is_saved, known = self.saver.step == self.state.step, self.state.evaluation
        if self.due(self.config.trainer.eval_interval):
            if not self.state.evaluation:
                self.evaluate()
            if not self.state.sampled:
                self.sample()
        interval = self.config.checkpoint.interval
        # a signal had this step saved before its evaluation, by which the best checkpoint is chosen
        is_news = is_saved and interval is not None and self.state.evaluation != known
        if is_news or (not is_saved and self.due(interval)):
            self.save()
        if self.due(self.config.checkpoint.hf_interval) and self.exported != self.state.step:
            self.export()
        self.meter.restart_step()

    def batches(self) -> Iterator[StepBatch]:
        """This rank's part of every step from the current one on, prefetched by a thread."""
        ranks = {"dp_rank": self.runtime.rank, "dp_size": self.runtime.world_size}
        with closing(train_batches(self.data.plan, start_step=self.state.step, **ranks)) as batches:
            for batch in batches:
                self.meter.data_ready()
                yield batch

    def train(self, batch: StepBatch) -> None:
        """Take one step and report it."""
        lr = learning_rate(self.config.scheduler, self.state.step, self.state.schedule_steps, self.config.optimizer.lr)
        micro_batches = [micro.to(self.runtime.device) for micro in batch.micro_batches]
        try:
            result = self.engine.train_step(micro_batches, batch.supervised_tokens, lr)
        except TrainingError as error:
            self.save_last_step("the step failed")
            raise TrainingError(f"step {self.state.step + 1}: {error} (samples of the step: {self.places(batch.samples)})") from None
        self.state.advance(epoch=batch.epoch, tokens=batch.tokens, updated=result.updated)
        self.rng = state.rng_state()  # so that neither an evaluation nor an aborted next step changes what is saved
        self.meter.count(batch)
        if self.state.step % self.config.trainer.log_interval == 0 or self.state.step == self.total_steps:
            self.report(self.meter.row(self.state, batch, result, lr, self.data.plan.epochs_after(self.state.step)))
        if not result.updated:
            self.skipped(result.grad_norm, batch.samples)

    def skipped(self, grad_norm: float, samples: list[int]) -> None:
        """Say that an update was left out; give up after optimizer.max_nonfinite in a row."""
        in_a_row, most = self.state.skipped_in_a_row, self.config.optimizer.max_nonfinite
        log.warning(f"step {self.state.step}: gradient norm {grad_norm}; update left out ({self.state.skipped_updates} so far)")
        if in_a_row >= most:
            self.save_last_step("too many updates were left out")
            raise TrainingError(
                f"step {self.state.step}: {in_a_row} updates in a row had a non-finite loss or gradient, and "
                f"optimizer.max_nonfinite={most}; the weights are those of step {self.state.step - in_a_row}. Lower optimizer.lr, or look at the "
                f"data (samples of the step: {self.places(samples)})"
            )

    def evaluate(self) -> None:
        """Mean loss over the held-out data, if there is any."""
        if self.data.eval is None:
            return
        batches = eval_batches(
            self.data.eval.cache, self.data.eval.selection, self.config, dp_rank=self.runtime.rank, dp_size=self.runtime.world_size
        )
        loss, tokens = self.engine.evaluate(batch.to(self.runtime.device) for batch in batches)
        values = evaluation(loss, tokens)
        self.state.evaluation = values
        self.report({"train/step": self.state.step, "train/total_tokens": self.state.tokens, **values})

    def sample(self) -> None:
        """Answer trainer.sample_prompts and show the answers. All ranks take part."""
        config, stop, samples = self.config.trainer, self.tokenizer.stop_token_ids, list[Sample]()
        for prompt, ids in zip(config.sample_prompts, sample_prompts(self.config, self.tokenizer), strict=True):
            self.stopping.check()
            answer = self.engine.answer(ids, config.sample_tokens, stop)
            samples.append({"train/step": self.state.step, "prompt": prompt, "text": self.tokenizer.decode(answer)})
        if samples:
            self.trackers.show(samples)
        self.state.sampled = True

    def save(self) -> None:
        """Commit a checkpoint to resume from, or with checkpoint.asynchronous start to."""
        metrics = self.run_dir / "metrics.jsonl"
        if self.runtime.rank == 0 and metrics.exists():
            sync(metrics)  # a checkpoint must not outlive the rows that lead to it
        tensors = state.trained_tensors(self.engine.model, self.engine.optimizers)
        self.saver.save(Snapshot(tensors, deepcopy(self.state), self.trajectory, self.rng))
        self.warn_of_changed_data()

    def save_last_step(self, why: str) -> None:
        """Before the run ends early: commit the last finished step, unless nothing is to be saved."""
        self.saver.wait()
        if self.config.checkpoint.interval is None:
            log.warning(f"{why}; nothing is saved, as checkpoint.interval=null")
        elif self.saver.step != self.state.step and self.state.step > 0:
            log.info(f"{why}; step {self.state.step} is saved first")
            self.save()
            self.saver.wait()

    def warn_of_changed_data(self) -> None:
        """Report once which data files have changed since they were read; the run continues with what it has read."""
        if self.runtime.rank == 0 and not self.told_of_changes and (changed := changed_files(self.run_dir)):
            log.warning(
                f"data has changed since it was read: {', '.join(changed)}; this run keeps using the cached version and can be resumed only with it"
            )
            self.told_of_changes = True

    def export(self) -> None:
        """Commit the weights as a Hugging Face directory: each in its dtype in `pretrained`, fp32 for a model that started from random weights.
        With an adapter, checkpoint.hf_merge decides what is written."""
        self.exported = self.state.step
        model, keep = self.config.model, self.config.checkpoint.hf_keep
        where = (self.run_dir / "hf", self.state.step, self.engine.model, model, self.tokenizer)
        if self.config.exports_adapter:
            path = export.export_adapter(*where, keep=keep)
            log.info(f"adapter exported for peft: {path}")
            return
        path = export.export(*where, keep=keep)
        log.info(f"exported for Hugging Face: {path}")

    def due(self, interval: int | None) -> bool:
        """Every `interval` steps and at the end; -1: at the end only; None: never."""
        if interval is None:
            return False
        return self.state.step == self.total_steps or (interval > 0 and self.state.step % interval == 0)

    def report(self, row: Row) -> None:
        """Hand a row to every tracker, and keep it for the summary."""
        self.metrics |= row
        self.trackers.log(row)

    def places(self, samples: list[int]) -> str:
        """Where the first four of `samples` come from, as FILE:LINE."""
        places = [self.data.train.cache.locate(sample) for sample in samples[:4]]
        more = f" and {len(samples) - 4} more" if len(samples) > 4 else ""
        return ", ".join(f"{file}:{line}" for file, line in places) + more
