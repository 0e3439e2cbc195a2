"""`export RUN --to DIR [--step N] [--dtype D] [--merge]`: a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner_hydra.build import build_model
from xtuner_hydra.checkpoint.commit import committed, damage, newest_whole, step_of
from xtuner_hydra.checkpoint.export import DTYPES, export_adapter_to, export_to, exported_dtype
from xtuner_hydra.data.tokenizers import load_tokenizer
from xtuner_hydra.errors import EXIT_DONE, RefusedError
from xtuner_hydra.parallel.runtime import runtime
from xtuner_hydra.results.run import Run, load_run
from xtuner_hydra.trained import on_one_rank, refuse_several_ranks


def main(argv: list[str]) -> int:
    """Write the directory, whole or not at all, and say where it is."""
    arguments = _parser().parse_args(argv)
    refuse_several_ranks("export")
    run = load_run(arguments.run)
    checkpoint = _checkpoint(run, arguments.step)
    directory: Path = arguments.to.expanduser().resolve()
    _refuse_used(directory)
    model = run.config.model
    tokenizer = load_tokenizer(model)
    config = on_one_rank(run.config)
    config.trainer.device = "cpu"  # nothing is computed
    alone = model.adapter is not None and not arguments.merge
    if arguments.merge and model.adapter is None:
        raise RefusedError(f"export: {run.directory} has no adapter to merge; leave --merge out")
    if alone and not model.pretrained:
        raise RefusedError(f"export: {run.directory} trained an adapter of random weights, which no one else has; add --merge")
    if alone and arguments.dtype:
        raise RefusedError("export: --dtype is for whole weights; an adapter stays in float32. Add --merge, or leave it out")
    with runtime(config) as place:
        trained = build_model(config, place, checkpoint)
        if alone:
            export_adapter_to(directory, trained, model, tokenizer)
        else:
            export_to(directory, trained, model, tokenizer, dtype=arguments.dtype)
    what = "the adapter alone" if alone else arguments.dtype or exported_dtype(model)
    print(f"exported step {step_of(checkpoint)} of {run.directory} ({what}): {directory}")
    return EXIT_DONE


def _checkpoint(run: Run, step: int | None) -> Path:
    """The newest whole checkpoint, or that of `step`."""
    parent = run.directory / "checkpoints"
    if step is None:
        if newest := newest_whole(parent):
            return newest
        raise RefusedError(f"export: {run.directory} has no whole checkpoint (checkpoints/step-N); train with checkpoint.interval=-1")
    path = parent / f"step-{step}"
    steps = ", ".join(str(step_of(one)) for one in committed(parent))
    there = f"there are checkpoints of step {steps}" if steps else "the run has no whole checkpoint"
    if not path.is_dir():
        raise RefusedError(f"export: {run.directory} has no checkpoint of step {step}; {there}")
    if problem := damage(path, content=True):
        raise RefusedError(f"export: {path} is not a whole checkpoint: {problem}; {there}")
    return path


def _refuse_used(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RefusedError(f"export: --to {directory}: holds something already; name a new directory, or an empty one")
    if not directory.parent.is_dir():
        raise RefusedError(f"export: --to {directory}: {directory.parent} is not a directory; make it first")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtuner-hydra export", description="Write a checkpoint of a run as a directory that Hugging Face's tools load."
    )
    parser.add_argument("run", metavar="RUN", help="the directory of a run")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the directory to make; it must be new or empty")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; else the newest")
    parser.add_argument("--merge", action="store_true", help="add an adapter to the weights of its base, instead of writing it alone")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights; else that of model.pretrained, or float32")
    return parser
