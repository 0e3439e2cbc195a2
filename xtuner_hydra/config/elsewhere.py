"""What other trainers (TRL, LLaMA-Factory, axolotl, XTuner) call our keys, for whoever types the name they are used to."""

from __future__ import annotations

_NAMES = {
    "optimizer": ("optim",),
    "optimizer.lr": ("learning_rate", "max_lr", "peak_lr"),
    "optimizer.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.eps": ("adam_epsilon",),
    "scheduler.name": ("lr_scheduler_type", "lr_scheduler"),
    "scheduler.lr_min": ("min_lr", "cosine_min_lr_ratio"),
    "trainer.epochs": ("num_train_epochs", "num_epochs", "epoch", "total_epoch"),
    "trainer.total_steps": ("max_steps", "steps", "num_steps", "total_step"),
    "trainer.global_batch_size, the packs of a step over all ranks": (
        *("per_device_train_batch_size", "micro_batch_size", "train_batch_size", "batch_size", "gradient_accumulation_steps"),
    ),
    "trainer.eval_interval": ("eval_steps", "evals_per_epoch", "eval_strategy"),
    "trainer.log_interval": ("logging_steps",),
    "checkpoint.interval": ("save_steps", "saves_per_epoch", "save_strategy", "checkpoint_interval"),
    "checkpoint.keep": ("save_total_limit",),
    "checkpoint.resume": ("resume_from_checkpoint", "resume_from", "auto_resume"),
    "parallelism.recompute_ratio": ("gradient_checkpointing", "activation_checkpointing"),
    "parallelism.param_dtype": ("bf16", "fp16", "dtype", "torch_dtype"),
    "parallelism.nproc_per_node": ("num_gpus", "num_processes", "nproc"),
    "parallelism.compile": ("torch_compile",),
    "model.lora.rank": ("lora_r", "lora_rank"),
    "model.lora.targets": ("lora_target", "lora_target_modules", "target_modules"),
    "model.pretrained, with model=hf": ("model_name_or_path", "base_model", "model_name", "model_path"),
    "model.chat_template": ("template",),
    "data.path": ("dataset", "datasets", "dataset_path", "dataset_name", "train_file", "train_data"),
    "data.eval_ratio": ("val_size", "val_set_size", "test_size"),
    "data.pack_max_length": ("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "seq_len", "block_size"),
    "data.pack_strategy": ("packing", "sample_packing"),
    "hydra.run.dir": ("output_dir", "work_dir", "save_dir"),
    "tracking": ("report_to",),
    "tracking.wandb.name": ("run_name",),
    "tracking.wandb.project": ("wandb_project",),
}
_KEYS = {name: key for key, names in _NAMES.items() for name in names}


def ours(key: str) -> str:
    """` That is X here.` for a key that another trainer has under this name, or an empty string."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    return f" That is {_KEYS[name]} here." if name in _KEYS else ""
