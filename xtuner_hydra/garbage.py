"""How often Python looks for cyclic garbage: seldom while a process starts, as usual while it trains.

An import leaves hardly any, but makes objects by the hundred thousand, and looking through those at Python's pace takes a fifth of its time
(scripts/results/LOG.md). In training it matters: a cycle may hold a tensor."""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()


def collect_seldom() -> None:
    """For a process that begins: after every 200,000 new objects."""
    gc.set_threshold(200_000, *_USUAL[1:])


def collect_as_usual() -> None:
    """For what runs long: at Python's own pace."""
    gc.set_threshold(*_USUAL)
