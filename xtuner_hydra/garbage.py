"""How often Python looks for cyclic garbage: seldom while a process starts, as usual while it trains.

Imports create many objects but few cycles; the default threshold costs a fifth of import time (scripts/results/LOG.md). In training it
matters: a cycle may hold a tensor."""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()


def collect_seldom() -> None:
    """For a process that is starting: after every 200,000 new objects."""
    gc.set_threshold(200_000, *_USUAL[1:])


def collect_as_usual() -> None:
    """For a process that runs long: at Python's default threshold."""
    gc.set_threshold(*_USUAL)
