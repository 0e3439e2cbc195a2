"""A trained model, ours or another: what it is, where its weights are, and how to load them for use."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from xtuner_hydra.checkpoint.commit import newest_whole, step_of
from xtuner_hydra.checkpoint.state import load_weights, refuse_other_base
from xtuner_hydra.config.schema import Config, ModelConfig
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.machine import started_by_torchrun
from xtuner_hydra.model.adapters import blueprint
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.model.hub import local_directory
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.pretrained import check_pretrained, load_pretrained
from xtuner_hydra.model.saved_adapter import CONFIG as ADAPTER
from xtuner_hydra.model.saved_adapter import load_adapter, read_adapter
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.runtime import DTYPES, device_type, param_dtype
from xtuner_hydra.results.run import Run, load_run
from xtuner_hydra.results.sweep import SWEEP_FILE


@dataclass(frozen=True)
class Trained:
    """`weights`: one of our checkpoints if `is_checkpoint`, a directory with only an adapter if `is_adapter` (its base is
    `model.pretrained`), else a Hugging Face directory. run: the run that they come from, if it is ours."""

    model: ModelConfig
    weights: Path
    is_checkpoint: bool = False
    is_adapter: bool = False
    run: Run | None = None

    def load(self) -> CausalLM:
        """The model on the best device here, in the compute dtype of its run, else the one that is fast on the device."""
        device, wanted = "auto", self.run.config.parallelism.param_dtype if self.run else "auto"
        model = self._blueprint().to(DTYPES[param_dtype(wanted, device)]).to_empty(device=device_type(device)).eval()
        if not self.is_checkpoint:
            load_pretrained(model, self.model.pretrained or self.weights)
            if self.is_adapter:
                load_adapter(model, self.weights)
            return model
        assert self.run is not None
        config = self.run.config
        refuse_other_base(self.weights, config.model.pretrained)
        if config.model.pretrained:  # what was frozen is not in the checkpoint
            load_pretrained(model, config.model.pretrained, seed=config.trainer.seed)
        else:
            initialise(model, config.trainer.seed)
        load_weights(self.weights, model)
        return model

    def _blueprint(self) -> CausalLM:
        if self.is_checkpoint and self.run is not None:
            return blueprint(self.run.config)
        if self.is_adapter:
            return blueprint(Config(model=self.model))
        with torch.device("meta"):
            return CausalLM(self.model)


def find(name: str) -> Trained:
    """The model that `name` means: a run directory's newest checkpoint or export, a Hugging Face directory, a Hub id.

    Raises RefusedError if there is none, or if it is damaged or not supported."""
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        return _of_run(load_run(path))
    if (path / SWEEP_FILE).is_file():
        raise RefusedError(f"{name}: a sweep, not a run; its runs are the directories in it")
    directory = local_directory(str(path)).resolve()
    if (directory / ADAPTER).is_file() and not (directory / "config.json").is_file():
        return _of_adapter(directory)
    if not (directory / "config.json").is_file():
        what = "neither a run (config.yaml) nor a Hugging Face model (config.json)" if directory.is_dir() else "there is no such directory"
        raise RefusedError(f"{name}: {what}; give the directory of a run, a directory that save_pretrained made, or a Hub id")
    model = ModelConfig(**read_hf_config(directory), pretrained=str(directory))
    check_pretrained(model)
    return Trained(model, directory)


def on_one_rank(config: Config) -> Config:
    """`config` for one process, whatever the number of ranks it was trained on."""
    config = copy.deepcopy(config)
    parallelism = config.parallelism
    parallelism.nproc_per_node, parallelism.dp_replicate, parallelism.dp_shard = 1, 1, -1
    return config


def refuse_several_ranks(verb: str) -> None:
    """RefusedError under torchrun."""
    if started_by_torchrun():
        raise RefusedError(f"{verb}: works in one process; start it without torchrun")


def _of_run(run: Run) -> Trained:
    """The newest; of a checkpoint and an export of the same step the checkpoint, whose weights are not rounded."""
    checkpoint, export = (newest_whole(run.directory / name) for name in ("checkpoints", "hf"))
    if checkpoint and (not export or step_of(checkpoint) >= step_of(export)):
        return Trained(run.config.model, checkpoint, is_checkpoint=True, run=run)
    if not export:
        raise RefusedError(
            f"{run.directory}: this run has no complete checkpoint or export (checkpoints/step-N, hf/step-N); "
            "checkpoint.interval=-1 saves one after the last step"
        )
    if (export / ADAPTER).exists():
        return Trained(run.config.model, export, is_adapter=True, run=run)
    return Trained(replace(run.config.model, pretrained=str(export)), export, run=run)


def _of_adapter(directory: Path) -> Trained:
    """An adapter on its own, with its base from where its config says. A tokenizer beside it takes precedence over the base's."""
    base, lora = read_adapter(directory)
    tokenizer = str(directory) if any(directory.glob("tokenizer*")) else None
    model = ModelConfig(**read_hf_config(base), pretrained=str(base), tokenizer=tokenizer, adapter="lora", lora=lora)
    check_pretrained(model)
    return Trained(model, directory, is_adapter=True)
