"""All that is done to data before training: find files, tokenise into caches, select, plan. Bad data is refused here, before anything starts.

The Hydra process prepares once and leaves data.json in the run directory; workers open the same caches from there. Lines that were left out
(data.bad_lines=skip) stand in bad_lines.jsonl beside it, an object with file, line, kind and message each."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtuner_hydra.config.schema import Config, DataConfig
from xtuner_hydra.data.bad_lines import Skipped
from xtuner_hydra.data.cache import CacheError, TokenCache, all_or_nothing, build_cache, open_cache
from xtuner_hydra.data.changes import DATA_FILE
from xtuner_hydra.data.mixture import Mixture, Samples, held_out, parts_of
from xtuner_hydra.data.plan import Selection, TrainPlan, held_out_limit, join, select_samples, training_limit
from xtuner_hydra.data.readers import unit
from xtuner_hydra.data.sources import resolve_files
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.errors import ConfigError, DataError
from xtuner_hydra.files import write_json, write_text

log = logging.getLogger("xtuner_hydra")

EXAMPLES = Path(__file__).parents[1] / "examples"
BAD_LINES = "bad_lines.jsonl"


@dataclass(frozen=True)
class Source:
    """Samples and what of them is used."""

    cache: Samples
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
        saved = json.loads((run_dir / DATA_FILE).read_text(encoding="utf-8"))
        held = _open(saved["eval"]) if config.data.eval_path is not None else None
        return _assemble(config, _open(saved["train"]), held, tokenizer_name=saved["tokenizer"])

    def save(self, run_dir: Path) -> None:
        """Write data.json: files with their hashes, caches, counts; and bad_lines.jsonl where lines were left out."""
        if bad := self._bad_lines():
            write_text(run_dir / BAD_LINES, "".join(json.dumps(vars(line), ensure_ascii=False) + "\n" for line in bad))
        else:
            (run_dir / BAD_LINES).unlink(missing_ok=True)  # of the run that is resumed here
        write_json(run_dir / DATA_FILE, self.describe())

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        return {
            "tokenizer": self.tokenizer_name,
            "train": _describe(self.train),
            "eval": _describe(self.eval) if self.eval else None,
            "bad_lines_file": BAD_LINES if self._bad_lines() else None,
        }

    def _bad_lines(self) -> list[Skipped]:
        """Those of the training data, then of the held-out data; once where these are the same files."""
        return list(dict.fromkeys([*self.train.cache.skipped, *(self.eval.cache.skipped if self.eval else [])]))

    def summary(self) -> list[str]:
        """The data as lines for people."""
        plan, selection = self.plan, self.train.selection
        return [
            f"tokenizer: {self.tokenizer_name}",
            *_training_files(self.train, plan.data),
            f"{len(selection)} samples -> {len(plan.epoch_packs(0))} packs of up to {plan.data.pack_max_length} tokens "
            f"({plan.data.pack_strategy}), {plan.utilization:.1%} full{_left_out(selection)}",
            *(describe_held_out(self.eval, self.plan.data.eval_ratio) if self.eval else []),
        ]


def prepare(config: Config, tokenizer: Tokenizer, *, progress: bool) -> PreparedData:
    """Read, check, tokenise, select and plan. Raises DataError or ConfigError, and then leaves nothing behind."""
    data = config.data
    with _caches(data, tokenizer, progress) as open_or_build:
        train = _training_caches(data, open_or_build)
        held = open_or_build(data.eval_path, "data.eval_path", data.format, "data.format") if data.eval_path is not None else None
        if held is not None and (both := set(held.file_hashes).intersection(train.file_hashes)):
            names = [str(file) for file, digest in zip(held.files, held.file_hashes, strict=True) if digest in both]
            log.warning(f"held-out data that is trained on too: {', '.join(names)}; eval/loss will be lower than on data that is new")
        if held is not None and _are_examples(held) and not _are_examples(train):
            log.warning(
                "held-out data is the example that ships with xtuner_hydra, and training data is not: eval/loss says nothing about yours. "
                "Set data.eval_path=FILE, data.eval_ratio=0.05 with data.eval_path=null, or data.eval_path=null"
            )
        return _assemble(config, train, held, tokenizer_name=tokenizer.name)


def prepare_held_out(config: Config, tokenizer: Tokenizer, *, progress: bool) -> Source | None:
    """The held-out data alone, as `prepare` would have it; None where there is none. Raises DataError or ConfigError likewise."""
    data = config.data
    with _caches(data, tokenizer, progress) as open_or_build:
        if data.eval_path is not None:
            return _held_out(config, open_or_build(data.eval_path, "data.eval_path", data.format, "data.format"), None)
        if data.eval_ratio is not None:
            train = _training_caches(data, open_or_build)
            return _held_out(config, train, held_out(train, data.eval_ratio))
    return None


def _are_examples(data: Samples) -> bool:
    return all(file.is_relative_to(EXAMPLES) for file in data.files)


OpenOrBuild = Callable[[Any, str, str, str], TokenCache]
"""(files, the key that names them, format, the key that names it) -> their token cache."""


@contextmanager
def _caches(data: DataConfig, tokenizer: Tokenizer, progress: bool) -> Iterator[OpenOrBuild]:
    """Opens or builds caches. Those that are new stay only if nothing is raised."""
    cache_dir = _cache_dir(data.cache_dir)
    with all_or_nothing(cache_dir) as built:

        def open_or_build(path: Any, key: str, format: str, format_key: str) -> TokenCache:
            cache = build_cache(
                resolve_files(path, key),
                format,
                tokenizer,
                bad_lines=data.bad_lines,
                cache_dir=cache_dir,
                num_workers=data.num_workers,
                progress=progress,
                key=key,
                format_key=format_key,
            )
            if cache.built:
                built.append(cache)
            return cache

        yield open_or_build


def _training_caches(data: DataConfig, open_or_build: OpenOrBuild) -> Samples:
    if not data.sources:
        return open_or_build(data.path, "data.path", data.format, "data.format")
    caches = []
    for i, source in enumerate(data.sources):
        format, format_key = (data.format, "data.format") if source.format is None else (source.format, f"data.sources[{i}].format")
        caches.append(open_or_build(source.path, f"data.sources[{i}].path", format, format_key))
    return _together(caches)


def _together(caches: list[TokenCache]) -> Samples:
    return caches[0] if len(caches) == 1 else Mixture(caches)


def refuse_ids_without_a_row(sources: Sequence[Source | None], vocab_size: int, tokenizer: Tokenizer) -> None:
    """ConfigError where a token of the data has no row in an embedding of `vocab_size` rows. A tokenizer may have more ids than are used."""
    cache = max((source.cache for source in sources if source), key=lambda cache: cache.largest_id)
    if cache.largest_id < vocab_size:
        return
    sample = next(sample for sample in range(len(cache)) if cache.ids(sample).max() >= vocab_size)
    file, line = cache.locate(sample)
    token = next(number for number in cache.ids(sample).tolist() if number >= vocab_size)
    raise ConfigError(
        "model.vocab_size",
        vocab_size,
        f"{file} {unit(file)} {line} holds token {token} ({tokenizer.decode([token])!r}), and the embedding has rows for 0 to {vocab_size - 1}; "
        f"take the tokenizer that belongs to the weights, or with random weights set model.vocab_size={tokenizer.vocab_size} or more",
    )


def describe_held_out(source: Source, ratio: float | None) -> list[str]:
    """Lines for people: where held-out data is from, and what was cut or left out. ratio: data.eval_ratio."""
    if ratio is None:
        return _files("held-out data", source.cache, _left_out(source.selection)) + describe_skipped(source.cache.skipped)
    return [
        f"held-out data: {len(source.selection)} of the {len(source.cache)} samples (eval_ratio {ratio:g}){_left_out(source.selection)}"
    ]


def describe_skipped(skipped: list[Skipped]) -> list[str]:
    """Lines for people: how many lines were left out of each kind, and the first three by name."""
    if not skipped:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(line.kind for line in skipped).most_common())
    first = (f"  {line.file} {unit(Path(line.file))} {line.line}: {line.message}" for line in skipped[:3])
    return [f"{len(skipped)} line{'s' * (len(skipped) > 1)} skipped ({kinds})", *first]


def _held_out(config: Config, samples: Samples, apart: np.ndarray | None) -> Source:
    """`samples`, or those of the training data that are set `apart`, cut to their own limit."""
    data, key = config.data, "data.eval_path" if apart is None else "data.eval_ratio"
    limit = held_out_limit(data, config.model)
    return Source(samples, select_samples(samples, data, limit, seed=config.trainer.seed, sample_ratio=1.0, key=key, among=apart))


def _assemble(config: Config, train: Samples, held: Samples | None, *, tokenizer_name: str) -> PreparedData:
    data = config.data
    apart = held_out(train, data.eval_ratio) if data.eval_ratio is not None else None
    selection = _select_training(train, data, config.trainer.seed, apart)
    evaluated = _held_out(config, train if held is None else held, apart) if held is not None or apart is not None else None
    return PreparedData(Source(train, selection), evaluated, TrainPlan(train, selection, data, config.trainer), tokenizer_name)


def _select_training(train: Samples, data: DataConfig, seed: int, apart: np.ndarray | None) -> Selection:
    selections, starts = [], []
    for (part, place), (key, ratio) in zip(parts_of(train), _ratios(data), strict=True):
        among = None if apart is None else ~apart[place]
        limit = training_limit(data)
        selections.append(select_samples(part, data, limit, seed=seed, sample_ratio=ratio, key=key, among=among))
        starts.append(place.start)
    return join(selections, starts)


def _ratios(data: DataConfig) -> list[tuple[str, float]]:
    """(key, how often it counts) of each source."""
    if not data.sources:
        return [("data.path", data.sample_ratio)]
    return [(f"data.sources[{i}].path", source.sample_ratio * data.sample_ratio) for i, source in enumerate(data.sources)]


def _open(saved: dict[str, Any]) -> Samples:
    return _together([_open_part(part) for part in saved["sources"]])


def _open_part(saved: dict[str, Any]) -> TokenCache:
    try:
        return open_cache(Path(saved["cache"]), [Path(file) for file in saved["files"]])
    except CacheError as error:
        raise DataError(f"token cache {saved['cache']}: {error}; it was there when the run was prepared. Start the run again") from None


def _describe(source: Source) -> dict[str, Any]:
    cache, selection = source.cache, source.selection
    return {
        "fingerprint": cache.fingerprint,
        "files": [str(file.resolve()) for file in cache.files],
        "hashes": cache.file_hashes,
        "stamps": cache.file_stamps,
        "samples": len(cache),
        "tokens": int(cache.lengths.sum()),
        "selected": {"samples": len(selection), "tokens": selection.tokens},
        "truncated": selection.truncated,
        "dropped": selection.dropped,
        "unsupervised": selection.unsupervised,
        "bad_lines": dict(Counter(line.kind for line in cache.skipped).most_common()),
        "sources": [
            {
                "cache": str(part.directory.resolve()),
                "files": [str(file.resolve()) for file in part.files],
                "samples": len(part),
                "tokens": int(part.lengths.sum()),
                "selected": dict(zip(("samples", "tokens"), _counts(selection, place), strict=True)),
            }
            for part, place in parts_of(cache)
        ],
    }


def _counts(selection: Selection, place: slice) -> tuple[int, int]:
    """(samples, tokens) that are selected of the samples with numbers in `place`."""
    inside = (selection.samples >= place.start) & (selection.samples < place.stop)
    return int(inside.sum()), int(selection.lengths[inside].sum())


def _training_files(source: Source, data: DataConfig) -> list[str]:
    """The files, and of a mixture what each source gives."""
    lines: list[str] = []
    for number, ((part, place), (_, ratio)) in enumerate(zip(parts_of(source.cache), _ratios(data), strict=True)):
        lines += _files("training data", part, f" (sample_ratio {ratio:g})")
        if data.sources:
            samples, tokens = _counts(source.selection, place)
            lines.append(f"source {number}: {samples} samples, {tokens:,} tokens, {tokens / source.selection.tokens:.1%} of all")
    return lines + describe_skipped(source.cache.skipped)


def _files(title: str, cache: Samples, remark: str) -> list[str]:
    return [f"{title}: {file}: {count} samples{remark}" for file, count in zip(cache.files, cache.sample_counts, strict=True)]


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
