"""`evaluate RUN_OR_DIR [overrides]`: the loss of a trained model on held-out data, as training computes it.

A run gives model, data and settings, which overrides change; for a Hugging Face directory they come from conf/, as in training. All is
computed on one rank."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtuner_hydra.app import App
from xtuner_hydra.build import build_engine
from xtuner_hydra.config.names import split_override
from xtuner_hydra.config.schema import Config, LoRAConfig, ModelConfig
from xtuner_hydra.config.strict import changed, known_keys
from xtuner_hydra.data.loader import eval_batches
from xtuner_hydra.data.prepare import Source, describe_held_out, prepare_held_out, refuse_ids_without_a_row
from xtuner_hydra.data.tokenizers import load_tokenizer
from xtuner_hydra.errors import EXIT_DONE, RefusedError
from xtuner_hydra.files import finite
from xtuner_hydra.metrics import evaluation
from xtuner_hydra.model.saved_adapter import load_adapter
from xtuner_hydra.parallel.runtime import param_dtype, runtime
from xtuner_hydra.safe_text import printable
from xtuner_hydra.tools.rerun import again
from xtuner_hydra.trained import Trained, find, on_one_rank, refuse_several_ranks

HELP = """usage: xtuner-hydra evaluate RUN_OR_DIR [KEY=VALUE]... [GROUP=OPTION]... [--json] [--trust]

Evaluate the newest checkpoint (or export) of the run RUN, or the model of a Hugging Face directory or Hub id, on data.eval_path. A directory
may hold an adapter alone; its base is read from where adapter_config.json says.
--json prints one JSON object. --trust runs the function that RUN names in data.format=package.module:function, where it does.

  xtuner-hydra evaluate outputs/mine
  xtuner-hydra evaluate outputs/mine data.eval_path=other.jsonl
  xtuner-hydra evaluate DIR data.eval_path=held_out.jsonl parallelism.param_dtype=float32 --json"""

_IDLE = ("optimizer", "scheduler", "trainer", "checkpoint", "tracking", "sweep")
"""Groups that say how a model is trained."""
_READ = ("trainer.device", "trainer.deterministic", "trainer.seed")
"""Their keys that an evaluation reads."""
_MAY_CHANGE = {"model.tokenizer", "model.chat_template", "model.pretrained", "model.strict"}


def main(argv: list[str]) -> int:
    """Evaluate and print; raises RefusedError for what cannot be evaluated."""
    if "-h" in argv or "--help" in argv:
        print(HELP)
        return EXIT_DONE
    refuse_several_ranks("evaluate")
    with App([word for word in argv if word != "--json"]) as app:
        trained = find(_subject(app))
        config = on_one_rank(_config(app, trained))
    tokenizer = load_tokenizer(config.model)
    held_out = prepare_held_out(config, tokenizer, progress=True)
    if held_out is None:
        raise RefusedError("evaluate: there is no held-out data; give some with data.eval_path=FILE")
    _refuse_trained_samples(config, trained, held_out)
    refuse_ids_without_a_row([held_out], config.model.vocab_size, tokenizer)
    for line in describe_held_out(held_out, config.data.eval_ratio):
        print(printable(line), file=sys.stderr)
    result = evaluate(trained, config, held_out)
    print(json.dumps(finite(result)) if "--json" in argv else printable(_sentence(result)))
    return EXIT_DONE


def evaluate(trained: Trained, config: Config, held_out: Source) -> dict[str, Any]:
    """`eval/loss`, `eval/perplexity`, `eval/tokens`; of what: `weights`, `data`; and how many samples that was and was not: `samples`, `truncated`,
    `dropped` as too long, `unsupervised` = without a supervised token, `bad_lines`."""
    with runtime(config) as place:
        engine = build_engine(config, place, trained.weights if trained.is_checkpoint else None)
        if trained.is_adapter:
            load_adapter(engine.model, trained.weights)
        batches = eval_batches(held_out.cache, held_out.selection, config, dp_rank=0, dp_size=1)
        loss, tokens = engine.evaluate(batch.to(place.device) for batch in batches)
    selection = held_out.selection
    return {
        **evaluation(loss, tokens),
        "weights": str(trained.weights),
        "data": [str(file) for file in held_out.cache.files],
        "samples": len(selection),
        **{name: getattr(selection, name) for name in ("truncated", "dropped", "unsupervised")},
        "bad_lines": len(held_out.cache.skipped),
    }


def _subject(app: App) -> str:
    """The word that names the model; the overrides stay in `app.overrides`."""
    args = app.args
    if app.is_sweep or args.cfg or args.info or args.hydra_help or args.shell_completion:
        raise RefusedError("evaluate: takes RUN_OR_DIR and overrides of one config")
    words = [word for word in app.overrides if "=" not in word or Path(word).is_dir()]
    if len(words) != 1:
        raise RefusedError("evaluate: name one run or Hugging Face directory: xtuner-hydra evaluate RUN_OR_DIR [KEY=VALUE]...")
    app.overrides.remove(words[0])
    return words[0]


def _config(app: App, trained: Trained) -> Config:
    """The config to evaluate with: the run's, or conf/'s, changed by the overrides."""
    _refuse_idle(app.overrides)
    if trained.run is None:
        given = ["model=hf", f"model.pretrained={_quoted(trained.model.pretrained)}", *app.overrides]
        config = app.compose([*_no_training_data(app.overrides), *given]).config
        reference = replace(trained.model, adapter=None, lora=LoRAConfig())
    else:
        if any(key == "data" for key, _ in map(split_override, app.overrides)):
            app.overrides = [*_no_training_data(app.overrides), *app.overrides]
        app.overrides += _no_share_held_out(app.overrides)
        config = again(app, trained.run).config
        reference = trained.run.config.model
    _refuse_another_model(config, reference)
    if not trained.is_checkpoint:
        config.model.pretrained = trained.model.pretrained
    if trained.is_adapter:
        config.model.adapter, config.model.lora = trained.model.adapter, trained.model.lora
        config.model.tokenizer = config.model.tokenizer or trained.model.tokenizer
    config.parallelism.param_dtype = param_dtype(config.parallelism.param_dtype, config.trainer.device)
    return config


def _refuse_trained_samples(config: Config, trained: Trained, held_out: Source) -> None:
    """RefusedError where a share is held out of the training data, but not the share that the run held out: it has trained on the rest."""
    if trained.run is None or (ratio := config.data.eval_ratio) is None:
        return
    before, then = trained.run.config.data.eval_ratio, trained.run.data.get("train") or {}
    if before is None or ratio > before or then.get("fingerprint", held_out.cache.fingerprint) != held_out.cache.fingerprint:
        raise RefusedError(
            f"evaluate: data.eval_ratio={ratio:g}: these are not the samples that the run held out, and it may have trained on some: the ratio, the "
            "data, its format, the tokenizer or its chat template has changed. Name held-out data with data.eval_path=FILE"
        )


def _no_share_held_out(overrides: list[str]) -> list[str]:
    """What makes way for a held-out file where the run held out a share of its training data."""
    keys = {key for key, _ in map(split_override, overrides)}
    return ["data.eval_ratio=null"] if "data.eval_path" in keys and "data.eval_ratio" not in keys else []


def _no_training_data(overrides: list[str]) -> list[str]:
    """What closes the data.path that an option of `data` may leave open: held-out data in its place, which is all that is read."""
    values = dict(map(split_override, overrides))
    held_out = values.get("data.eval_path", "null")
    return [] if held_out == "null" or "data.sources" in values else [f"data.path={held_out}"]


def _quoted(value: str | None) -> str:
    """A path as the value of an override."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _refuse_idle(overrides: list[str]) -> None:
    keys, known = [key for key, _ in map(split_override, overrides)], known_keys()
    for key in keys:
        if key in known and key.partition(".")[0] in _IDLE and key not in _READ:
            raise RefusedError(f"evaluate: {key}: plays no part where nothing is trained; leave it out")
        if key in ("data.path", "data.sources") and not {"data.eval_path", "data.eval_ratio"} & {*keys}:
            raise RefusedError(f"evaluate: {key}: is training data; name held-out data with data.eval_path=FILE")


def _refuse_another_model(config: Config, model: ModelConfig) -> None:
    differences = changed(config, Config(model=model, data=config.data))
    if others := [key for key in differences if key.startswith("model.") and key not in _MAY_CHANGE]:
        raise RefusedError(f"evaluate: {others[0]}: the weights belong to the model as it is; leave out what changes it")


def _sentence(result: dict[str, Any]) -> str:
    return (
        f"{result['weights']} on {', '.join(result['data'])}:\n"
        f"loss {result['eval/loss']:.6f}, perplexity {result['eval/perplexity']:.6g}, {result['eval/tokens']:,} supervised tokens"
    )
