"""Samples as people read them: the text of the tokens, with what is learnt of it marked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtuner_hydra.data.prepare import PreparedData, Source
from xtuner_hydra.data.tokenizers import Tokenizer
from xtuner_hydra.safe_text import printable

LEFT, RIGHT = "⟦", "⟧"
"""Around supervised text where there are no colours."""
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"

Piece = tuple[str, bool]


def pieces(tokenizer: Tokenizer, ids: NDArray[Any], supervised: NDArray[np.bool_]) -> list[Piece]:
    """(text, supervised) of each stretch of tokens with one supervision, in order."""
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    # text of all tokens up to an edge: some tokenizers take the space off the beginning of whatever they decode
    texts = [tokenizer.decode(ids[:edge].tolist()) if edge else "" for edge in edges]
    return [(texts[i + 1][len(texts[i]) :], bool(supervised[start])) for i, start in enumerate(edges[:-1])]


def marked(parts: list[Piece], *, colours: bool) -> str:
    """The text with supervised pieces in colour, or in brackets. Control characters are written out: a file must not steer the terminal."""
    left, right = (_GREEN, _PLAIN) if colours else (LEFT, RIGHT)
    return "".join(f"{left}{printable(text)}{right}" if supervised else printable(text) for text, supervised in parts)


def sample_pieces(source: Source, tokenizer: Tokenizer, place: int) -> list[Piece]:
    """The pieces of the sample at `place` of the selection, as far as it is used."""
    sample, length = int(source.selection.samples[place]), int(source.selection.lengths[place])
    return pieces(tokenizer, source.cache.ids(sample)[:length], source.cache.supervised(sample)[:length])


def first_sample(data: PreparedData, tokenizer: Tokenizer) -> str:
    """The first sample on one line, each of its first six pieces cut in the middle to about 60 characters."""
    parts = sample_pieces(data.train, tokenizer, 0)
    short = [(_shortened(text, 60).replace("\n", "\\n"), supervised) for text, supervised in parts[:6]]
    return f"first sample, learnt in {LEFT}{RIGHT}: {marked(short, colours=False)}{' ...' if len(parts) > 6 else ''}"


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"
