"""`data [overrides] [-n 3]`: show what a run would learn from: samples with supervised text marked, lengths, packs, what was left out and why."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from xtuner_hydra.app import App
from xtuner_hydra.data.mixture import parts_of
from xtuner_hydra.data.packing import Int64s
from xtuner_hydra.data.prepare import PreparedData, Source
from xtuner_hydra.data.readers import unit
from xtuner_hydra.data.show import LEFT, RIGHT, marked, sample_pieces
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.errors import EXIT_DONE, RefusedError
from xtuner_hydra.safe_text import printable

BINS = 12
WIDTH = 40

_REASONS = {
    "truncated": "cut to the longest that is allowed (data.max_length, data.pack_max_length; data.overlong=truncate)",
    "dropped": "dropped as longer than allowed (data.overlong=drop)",
    "unsupervised": "left out: no supervised token, or none before the cut",
}


def main(argv: list[str]) -> int:
    """Print the data of one run; refuses what the run would refuse."""
    number, rest = _number(argv)
    with App(rest) as app:
        if app.shows_something():
            return EXIT_DONE
        if app.is_sweep:
            raise RefusedError("data: give one run's overrides, without -m")
        composition = app.compose_run()  # refuses what can be refused before torch is imported
    from xtuner_hydra.launch import prepare

    prepared = prepare(composition)
    colours = sys.stdout.isatty()
    print("\n".join(describe(prepared.data, prepared.tokenizer, number, colours=colours)))
    return EXIT_DONE


def describe(data: PreparedData, tokenizer: Tokenizer, number: int, *, colours: bool) -> list[str]:
    """All that there is to show, as lines; `number`: samples of each source."""
    lines = [*map(printable, data.summary()), ""]
    if number:
        lines += [f"samples; what is learnt is {'green' if colours else f'in {LEFT}{RIGHT}'}", ""]
        lines += _samples(data.train, tokenizer, number, colours=colours)
    lines += ["lengths of the training samples, in tokens", *histogram(data.train.selection.lengths), ""]
    lines += [*_packs(data), "", *_lost("training data", data.train)]
    return lines + (_lost("held-out data", data.eval) if data.eval else [])


def histogram(lengths: Int64s) -> list[str]:
    """Bars of how many lengths are in each of BINS equal ranges, and the usual figures."""
    top = int(lengths.max())
    step = -(-top // BINS)
    counts = np.bincount((lengths - 1) // step)
    bars = [
        f"{start:>8} to {start + step - 1:<8}{count:>8}  {'#' * -(-int(count) * WIDTH // int(counts.max()))}"
        for start, count in zip(range(1, top + 1, step), counts, strict=False)
    ]
    return [
        *bars,
        f"shortest {lengths.min()}, median {np.median(lengths):.0f}, mean {lengths.mean():.0f}, longest {top}, all {lengths.sum():,}",
    ]


def _number(argv: list[str]) -> tuple[int, list[str]]:
    usage = "xtuner-hydra data [KEY=VALUE]... [GROUP=OPTION]... [-n N]"
    parser = argparse.ArgumentParser(prog="xtuner-hydra data", usage=usage, add_help=False, allow_abbrev=False)
    parser.add_argument("-n", type=int, default=3)
    known, rest = parser.parse_known_args(argv)
    if known.n < 0:
        raise RefusedError(f"data -n {known.n}: must be 0 or more samples")
    return known.n, rest


def _samples(source: Source, tokenizer: Tokenizer, number: int, *, colours: bool) -> list[str]:
    """The first `number` samples of each source."""
    lines = []
    for _, place in parts_of(source.cache):
        inside = np.flatnonzero((source.selection.samples >= place.start) & (source.selection.samples < place.stop))
        for which in inside[:number].tolist():
            lines += [_heading(source, which), marked(sample_pieces(source, tokenizer, which), colours=colours).rstrip("\n"), ""]
    return lines


def _heading(source: Source, which: int) -> str:
    sample, length = int(source.selection.samples[which]), int(source.selection.lengths[which])
    learnt, whole = int(source.cache.supervised(sample)[:length].sum()), int(source.cache.lengths[sample])
    cut = f", cut from {whole}" if length < whole else ""
    return f"--- {_place(source, sample)}: {length} tokens{cut}, {learnt} supervised"


def _packs(data: PreparedData) -> list[str]:
    epoch, plan = data.plan.epoch(0), data.plan
    packs, supervised = epoch.packs, int(epoch.supervised_tokens.sum())
    fullness = packs.lengths / plan.data.pack_max_length
    return [
        f"packs of the first epoch: {len(packs)} of up to {plan.data.pack_max_length} tokens ({plan.data.pack_strategy}), "
        f"{plan.utilization:.1%} full (the emptiest {fullness.min():.1%}), {len(packs.sample) / len(packs):.1f} samples each",
        f"supervised: {supervised:,} of {int(epoch.tokens.sum()):,} predictions, {supervised / int(epoch.tokens.sum()):.1%}",
    ]


def _lost(title: str, source: Source) -> list[str]:
    selection = source.selection
    lines = []
    for reason, words in _REASONS.items():
        if count := getattr(selection, reason):
            lines.append(f"{title}: {count} {words}")
            lines += [f"  {_place(source, sample)}: {source.cache.lengths[sample]} tokens" for sample in selection.examples[reason]]
    return lines or [f"{title}: nothing was cut or left out"]


def _place(source: Source, sample: int) -> str:
    file, line = source.cache.locate(sample)
    return f"{file} {unit(file)} {line}"
