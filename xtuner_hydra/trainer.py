"""The training loop. `fit` reads from top to bottom; what a step is stands in engine.py, what a checkpoint is in checkpoint/."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from xtuner_hydra.checkpoint import export, state
from xtuner_hydra.checkpoint.state import TrainState
from xtuner_hydra.config.schema import Config
from xtuner_hydra.data.loader import StepBatch, eval_batches, train_batches
from xtuner_hydra.data.prepare import PreparedData
from xtuner_hydra.data.prompts import sample_prompts
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.engine import Engine
from xtuner_hydra.errors import TrainingError
from xtuner_hydra.metrics import Meter, Row, evaluation
from xtuner_hydra.model.pretrained import pretrained_dtype
from xtuner_hydra.optim.schedules import learning_rate
from xtuner_hydra.parallel.runtime import DTYPES, Runtime
from xtuner_hydra.tracking.base import Sample, Trackers

log = logging.getLogger("xtuner_hydra")


class Trainer:
    """One run on one rank: data in, steps, metrics, evaluations and checkpoints out. `trackers` is empty on all ranks but the first."""

    def __init__(self, config: Config, run_dir: Path, runtime: Runtime, data: PreparedData, tokenizer: Tokenizer, engine: Engine) -> None:
        self.config = config
        self.run_dir = run_dir
        self.runtime = runtime
        self.data = data
        self.tokenizer = tokenizer
        self.engine = engine
        self.trackers = Trackers()
        self.total_steps = data.plan.total_steps
        self.state = TrainState()
        self.trajectory = state.trajectory(config, data.plan.fingerprint)
        self.metrics: Row = {}

    def resume_if_possible(self) -> int | None:
        """Continue from the checkpoint that the config names; the step it was taken after, or None."""
        checkpoint = state.find(self.config.checkpoint, self.run_dir)
        if checkpoint is None:
            return None
        self.state = state.load(checkpoint, self.engine.model, self.engine.optimizer)
        log.info(f"resumed from {checkpoint}: step {self.state.step}/{self.total_steps}, {self.state.tokens} tokens seen")
        return self.state.step

    def fit(self) -> Row:
        """Train to the end of the plan; returns the last metrics. Raises TrainingError when training cannot go on."""
        self.meter = Meter(self.runtime, self.config.model, DTYPES[self.config.parallelism.param_dtype])
        for batch in self.batches():
            self.train(batch)
            if self.due(self.config.trainer.eval_interval):
                self.evaluate()
                self.sample()
            if self.due(self.config.checkpoint.interval):
                self.save()
            if self.due(self.config.checkpoint.hf_interval):
                self.export()
            self.meter.restart_step()
        return self.metrics

    def batches(self) -> Iterator[StepBatch]:
        """This rank's part of every step from the present one on, prefetched by a thread."""
        ranks = {"dp_rank": self.runtime.rank, "dp_size": self.runtime.world_size}
        with closing(train_batches(self.data.plan, start_step=self.state.step, **ranks)) as batches:
            for batch in batches:
                self.meter.data_ready()
                yield batch

    def train(self, batch: StepBatch) -> None:
        """Take one step and report it."""
        lr = learning_rate(self.config.scheduler, self.state.step, self.total_steps, self.config.optimizer.lr)
        micro_batches = [micro.to(self.runtime.device) for micro in batch.micro_batches]
        try:
            result = self.engine.train_step(micro_batches, batch.supervised_tokens, lr)
        except TrainingError as error:
            raise TrainingError(f"step {self.state.step + 1}: {error} (samples of the step: {_some(batch.samples)})") from None
        self.state.advance(epoch=batch.epoch, tokens=batch.tokens, updated=result.updated)
        self.meter.count(batch)
        if not result.updated:
            log.warning(f"step {self.state.step}: gradient norm {result.grad_norm}; update left out ({self.state.skipped_updates} so far)")
        if self.state.step % self.config.trainer.log_interval == 0 or self.state.step == self.total_steps:
            self.report(self.meter.row(self.state, batch, result, lr, self.data.plan.epochs_after(self.state.step)))

    def evaluate(self) -> None:
        """Mean loss over the held-out data, if there is any."""
        if self.data.eval is None:
            return
        batches = eval_batches(
            self.data.eval.cache, self.data.eval.selection, self.config.data, dp_rank=self.runtime.rank, dp_size=self.runtime.world_size
        )
        loss, tokens = self.engine.evaluate(batch.to(self.runtime.device) for batch in batches)
        self.report({"train/step": self.state.step, "train/total_tokens": self.state.tokens, **evaluation(loss, tokens)})

    def sample(self) -> None:
        """Answer trainer.sample_prompts and show the answers. All ranks take part."""
        config, stop, samples = self.config.trainer, self.tokenizer.stop_token_ids, list[Sample]()
        for prompt, ids in zip(config.sample_prompts, sample_prompts(self.config, self.tokenizer), strict=True):
            answer = self.engine.answer(ids, config.sample_tokens, stop)
            samples.append({"train/step": self.state.step, "prompt": prompt, "text": self.tokenizer.decode(answer)})
        if samples:
            self.trackers.show(samples)

    def save(self) -> None:
        """Commit a checkpoint to resume from."""
        directory = self.run_dir / "checkpoints"
        state.save(directory, self.engine.model, self.engine.optimizer, self.state, self.trajectory, keep=self.config.checkpoint.keep)
        log.info(f"checkpoint saved: {directory / f'step-{self.state.step}'}")

    def export(self) -> None:
        """Commit the weights as a Hugging Face directory: in the dtype of `pretrained`, fp32 for a model that started from random weights.
        Of an adapter, what checkpoint.hf_merge says."""
        model, keep = self.config.model, self.config.checkpoint.hf_keep
        where = (self.run_dir / "hf", self.state.step, self.engine.model, model, self.tokenizer)
        if self.config.exports_adapter:
            path = export.export_adapter(*where, keep=keep)
            log.info(f"adapter exported for peft: {path}")
            return
        path = export.export(*where, dtype=pretrained_dtype(model.pretrained) if model.pretrained else "float32", keep=keep)
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


def _some(samples: list[int], most: int = 8) -> str:
    return ", ".join(map(str, samples[:most])) + (f" and {len(samples) - most} more" if len(samples) > most else "")
