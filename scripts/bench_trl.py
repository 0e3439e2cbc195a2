"""The contender `trl` of bench.py: TRL's SFTTrainer as its users run it, on the documents of the same packs. Run bench.py.

TRL's defaults: gradient checkpointing, its AdamW, its loss. Best-fit packs of the same length, one per device and pass, no padding; bf16
autocast if the config computes in it. Documents are given tokenised with labels, which TRL uses as they are; it packs and shuffles them
itself, so its steps differ from ours, and there may be one more, but together they hold the same documents. The loss counts towards the
forward phase, what gradient checkpointing recomputes towards the backward phase."""

from __future__ import annotations

import itertools
import tempfile
from collections import deque

import torch
from bench_contenders import Watch, count, lora, plain_model
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from xtuner_hydra.config.schema import Config
from xtuner_hydra.data.batch import IGNORE, PackedBatch
from xtuner_hydra.data.loader import StepBatch


def trl(config: Config, batches: list[StepBatch], watch: Watch) -> int:
    """Train one epoch of the documents; returns the number of trained parameters."""
    torch.manual_seed(config.trainer.seed)
    torch.optim.AdamW.step = watch.timed("optimizer", torch.optim.AdamW.step)
    torch.nn.utils.clip_grad_norm_ = watch.timed("clip", torch.nn.utils.clip_grad_norm_)
    torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            plain_model(config.model),
            _settings(config, directory),
            train_dataset=Dataset.from_list(
                [document for batch in batches for pack in batch.micro_batches for document in documents(pack)]
            ),
            processing_class=_no_tokenizer(),
            peft_config=lora(config) if config.model.adapter else None,
        )
        _observe(trainer, watch)
        trainer.train()
    return count(trainer.model)


def documents(pack: PackedBatch) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each document, the label of a token at that token, as TRL expects them."""
    ids = torch.cat([pack.ids, pack.labels[-1:].clamp(min=0)])  # the pack's last token, if it is learnt, is only a label
    labels = torch.cat([torch.tensor([IGNORE]), pack.labels])
    ends = pack.cu_seqlens.tolist()
    ends[-1] += int(labels[-1] != IGNORE)
    return [{"input_ids": ids[a:b].tolist(), "labels": labels[a:b].tolist()} for a, b in itertools.pairwise(ends)]


def _settings(config: Config, directory: str) -> SFTConfig:
    return SFTConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=config.parallelism.param_dtype == "bfloat16",
        packing=True,
        max_length=config.data.pack_max_length,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.trainer.global_batch_size,
        num_train_epochs=1,
        learning_rate=config.optimizer.lr,
        lr_scheduler_type="constant",
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.trainer.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """TRL requires one for padding; there is no padding here, nor any text."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<end>": 0}, "<end>")), eos_token="<end>", pad_token="<end>")


def _observe(trainer: SFTTrainer, watch: Watch) -> None:
    """Have `trainer` report its steps to `watch`: tokens are counted when a batch is assembled, which is before its step."""
    collate, compute_loss = trainer.data_collator, watch.timed("forward", trainer.compute_loss)
    tokens: deque[int] = deque()
    losses: list[float] = []

    def counted(examples):
        tokens.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    def noted(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.begin()

        def on_step_end(self, *args, **kwargs):
            watch.end(sum(losses), sum(tokens.popleft() for _ in losses))
            losses.clear()

    trainer.data_collator, trainer.compute_loss = counted, noted
    trainer.add_callback(Steps())
