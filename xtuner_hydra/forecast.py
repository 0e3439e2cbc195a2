"""What a run or a sweep would do, in words: steps, tokens, sizes, where it goes. For `plan`."""

from __future__ import annotations

from collections.abc import Collection

from xtuner_hydra.config.schema import Config
from xtuner_hydra.cost import Sizes, checkpoint_bytes, disk_bytes, export_bytes, kept
from xtuner_hydra.launch import Prepared
from xtuner_hydra.optim.schedules import learning_rate, warmup_steps
from xtuner_hydra.room import free_bytes
from xtuner_hydra.sweeps.draft import Draft, JobDraft
from xtuner_hydra.sweeps.driver import Launcher
from xtuner_hydra.words import counted


def of_run(prepared: Prepared) -> list[str]:
    """The plan as lines of text."""
    config, data, sizes = prepared.config, prepared.data, prepared.sizes
    shards = prepared.ranks // config.parallelism.dp_replicate
    return [
        *data.summary(),
        "",
        _line("run directory", str(prepared.composition.run_dir)),
        _line("continues from", str(prepared.checkpoint))
        if prepared.checkpoint
        else _line("starts from", config.model.pretrained or "random weights"),
        _line("model", f"{config.model.family}, {sizes.total / 1e6:.2f} M parameters{_trained(sizes)}"),
        _line("ranks", f"{prepared.ranks} ({config.parallelism.param_dtype} compute, fp32 master weights)"),
        _line(
            "steps",
            f"{data.plan.total_steps} ({counted(config.trainer.global_batch_size or prepared.ranks, 'pack')} a step over all ranks)",
        ),
        _line("tokens", f"{'' if data.plan.is_countable else 'about '}{data.plan.total_tokens:,}"),
        _line("packs an epoch", f"{len(data.plan.epoch_packs(0))}, {data.plan.utilization:.1%} full"),
        _line("learning rate", _schedule(config, data.plan.total_steps)),
        _line("memory", f"{_gb(sizes.state_bytes / shards)} GB a rank for weights, gradients and moments, activations apart"),
        _line("disk", _disk(config, sizes, data.plan.total_steps)),
        _line("free there", f"{_gb(free_bytes(prepared.composition.run_dir) or 0)} GB"),
    ]


def of_sweep(draft: Draft, launcher: Launcher, done: Collection[str] = ()) -> list[str]:
    """The plan of a sweep: its jobs, and what they cost together. done: signatures of jobs that have a result already."""
    head = ("job", "name", "steps", "tokens", "GB on disk", "")
    rows = [
        (str(one.job.number), one.job.name, f"{one.steps:,}", f"{one.tokens:,}", _gb(one.disk), _remark(one, done)) for one in draft.jobs
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    kinds = {"best": "one job's stay on disk at a time", "all": "all stay on disk", "none": "none stay on disk"}
    unique = [one for one in draft.jobs if one.twin is None]
    return [
        *([] if draft.is_list else [f"{draft.total} jobs drawn by sweep.search={draft.sweep.search} between these:"]),
        *table,
        "",
        _line("sweep", str(draft.directory)),
        _line("jobs", f"{draft.total}, varying {', '.join(parameter.key for parameter in draft.parameters)}"),
        _line("run in", launcher.describe()),
        _line("decided by", f"{draft.metric} ({draft.sweep.direction}d)"),
        *([_line("tokens", f"{sum(one.tokens for one in unique):,} in all jobs")] if draft.is_list else []),
        _line("memory", f"about {max(one.memory_gb for one in unique):.3g} GB a job"),
        _line("disk", f"{_gb(max(one.disk for one in unique))} GB a job; sweep.keep={draft.sweep.keep}: {kinds[draft.sweep.keep]}"),
    ]


def _remark(one: JobDraft, done: Collection[str]) -> str:
    if one.twin is not None:
        return f"the same as job {one.twin}, left out"
    return "done" if one.job.signature in done else ""


def _schedule(config: Config, total: int) -> str:
    scheduler, peak = config.scheduler, config.optimizer.lr
    warmup = warmup_steps(scheduler, total)
    rates = [learning_rate(scheduler, step, total, peak) for step in (0, min(warmup, total - 1), total // 2, total - 1)]
    told = [f"{rate:.3g} {when}" for rate, when in zip(rates, ("first", "peak", "half-way", "last"), strict=True)]
    return f"{scheduler.name}, {counted(warmup, 'warm-up step')}: {', '.join(told)}"


def _trained(sizes: Sizes) -> str:
    return f", {sizes.trainable / 1e6:.2f} M of them trained" if sizes.trainable < sizes.total else ""


def _disk(config: Config, sizes: Sizes, total: int) -> str:
    checkpoints, exports = kept(config.checkpoint, total)
    return (
        f"about {_gb(disk_bytes(config, sizes, total))} GB at the end "
        f"({counted(checkpoints, 'checkpoint')} of {_gb(checkpoint_bytes(sizes))} GB, "
        f"{counted(exports, 'export')} of {_gb(export_bytes(sizes))} GB)"
    )


def _gb(size: float) -> str:
    gb = size / 2**30
    return f"{gb:.3g}" if gb < 100 else f"{gb:.0f}"


def _line(name: str, value: str) -> str:
    return f"{name:<16}{value}"
