"""All that is done to data before training: find files, tokenise into caches, select, plan. Bad data is refused here, before anything starts.

The Hydra process prepares once and leaves data.json in the run directory; workers open the same caches from there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_hydra.config.schema import Config, DataConfig
from xtuner_hydra.data.cache import CacheError, TokenCache, all_or_nothing, build_cache, describe_skipped, open_cache
from xtuner_hydra.data.plan import Selection, TrainPlan, held_out_limit, select_samples, training_limit
from xtuner_hydra.data.sources import resolve_files
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.errors import DataError
from xtuner_hydra.files import write_json

FILE_NAME = "data.json"


@dataclass(frozen=True)
class Source:
    """A token cache and what of it is used."""

    cache: TokenCache
    selection: Selection


@dataclass(frozen=True)
class PreparedData:
    """Training data with its plan, and held-out data where there is some."""

    train: Source
    eval: Source | None
    plan: TrainPlan
    tokenizer_name: str

    @classmethod
    def load(cls, run_dir: Path, config: Config) -> PreparedData:
        """Open what `save` noted in `run_dir`, without reading the sources again. Raises DataError where a cache is gone."""
        saved = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
        held_out = _open(saved["eval"]) if saved["eval"] else None
        return _assemble(config, _open(saved["train"]), held_out, tokenizer_name=saved["tokenizer"])

    def save(self, run_dir: Path) -> None:
        """Write data.json: files with their hashes, caches, counts."""
        write_json(run_dir / FILE_NAME, self.describe())

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        return {"tokenizer": self.tokenizer_name, "train": _describe(self.train), "eval": _describe(self.eval) if self.eval else None}

    def summary(self) -> list[str]:
        """The data as lines for people."""
        plan, selection = self.plan, self.train.selection
        ratio = f" (sample_ratio {plan.data.sample_ratio:g})"
        return [
            f"tokenizer: {self.tokenizer_name}",
            *_files("training data", self.train, ratio),
            f"{len(selection)} samples -> {len(plan.epoch_packs(0))} packs of up to {plan.data.pack_max_length} tokens "
            f"({plan.data.pack_strategy}), {plan.utilization:.1%} full{_left_out(selection)}",
            *(_files("held-out data", self.eval, _left_out(self.eval.selection)) if self.eval else []),
        ]


def prepare(config: Config, tokenizer: Tokenizer, *, progress: bool) -> PreparedData:
    """Read, check, tokenise, select and plan. Raises DataError or ConfigError, and then leaves nothing behind."""
    with _caches(config.data, tokenizer, progress) as open_or_build:
        train = open_or_build(config.data.path, "data.path")
        held_out = open_or_build(config.data.eval_path, "data.eval_path") if config.data.eval_path is not None else None
        return _assemble(config, train, held_out, tokenizer_name=tokenizer.name)


def prepare_held_out(config: Config, tokenizer: Tokenizer, *, progress: bool) -> Source | None:
    """The held-out data alone, as `prepare` would have it; None where there is none. Raises DataError or ConfigError likewise."""
    if config.data.eval_path is None:
        return None
    with _caches(config.data, tokenizer, progress) as open_or_build:
        return _select_held_out(config, open_or_build(config.data.eval_path, "data.eval_path"))


@contextmanager
def _caches(data: DataConfig, tokenizer: Tokenizer, progress: bool) -> Iterator[Callable[[Any, str], TokenCache]]:
    """A function from (files, the key that names them) to their token cache. Caches that are new stay only if nothing is raised."""
    cache_dir = _cache_dir(data.cache_dir)
    with all_or_nothing(cache_dir) as built:

        def open_or_build(path: Any, key: str) -> TokenCache:
            cache = build_cache(
                resolve_files(path, key),
                data.format,
                tokenizer,
                bad_lines=data.bad_lines,
                cache_dir=cache_dir,
                num_workers=data.num_workers,
                progress=progress,
                key=key,
            )
            if cache.built:
                built.append(cache)
            return cache

        yield open_or_build


def _select_held_out(config: Config, cache: TokenCache) -> Source:
    limit = held_out_limit(config.data, config.model)
    return Source(cache, select_samples(cache, config.data, limit, seed=config.trainer.seed, sample_ratio=1.0, key="data.eval_path"))


def _assemble(config: Config, train: TokenCache, held_out: TokenCache | None, *, tokenizer_name: str) -> PreparedData:
    seed, data = config.trainer.seed, config.data
    selection = select_samples(train, data, training_limit(data), seed=seed, sample_ratio=data.sample_ratio, key="data.path")
    evaluated = _select_held_out(config, held_out) if held_out is not None else None
    return PreparedData(Source(train, selection), evaluated, TrainPlan(train, selection, data, config.trainer), tokenizer_name)


def _open(saved: dict[str, Any]) -> TokenCache:
    try:
        return open_cache(Path(saved["cache"]), [Path(file) for file in saved["files"]])
    except CacheError as error:
        raise DataError(f"token cache {saved['cache']}: {error}; it was there when the run was prepared. Start the run again") from None


def _describe(source: Source) -> dict[str, Any]:
    cache, selection = source.cache, source.selection
    return {
        "cache": str(cache.directory.resolve()),
        "fingerprint": cache.fingerprint,
        "files": [str(file.resolve()) for file in cache.files],
        "hashes": cache.file_hashes,
        "samples": len(cache),
        "tokens": int(cache.lengths.sum()),
        "selected": {"samples": len(selection), "tokens": selection.tokens},
        "truncated": selection.truncated,
        "dropped": selection.dropped,
        "unsupervised": selection.unsupervised,
        "skipped_lines": [vars(line) for line in cache.skipped],
    }


def _files(title: str, source: Source, remark: str) -> list[str]:
    cache = source.cache
    lines = [f"{title}: {file}: {count} samples{remark}" for file, count in zip(cache.files, cache.sample_counts, strict=True)]
    return lines + describe_skipped(cache.skipped)


def _left_out(selection: Selection) -> str:
    """`; 3 truncated, 1 dropped`: only what happened."""
    counts = {
        "truncated": selection.truncated,
        "dropped as too long": selection.dropped,
        "left out without a supervised token": selection.unsupervised,
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"; {told}" if told else ""


def _cache_dir(configured: str | None) -> Path:
    if configured is not None:
        return Path(configured).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtuner_hydra"
