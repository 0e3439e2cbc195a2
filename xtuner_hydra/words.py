"""Numbers, names and durations in readable form."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any


def value(thing: Any, digits: int = 4) -> str:
    """A config value as one would type it: 6e-05 is 6e-5, a long float has `digits` significant ones, a path its last two parts."""
    if isinstance(thing, bool) or thing is None:
        return {True: "true", False: "false", None: "null"}[thing]
    if isinstance(thing, float):
        return _float(thing, digits)
    text = ", ".join(map(value, thing)) if isinstance(thing, list | tuple) else str(thing)
    if text.startswith("/"):
        text = "/".join(text.rsplit("/", 2)[-2:])
    return text if len(text) <= 40 else text[:38] + "…"


def apart(values: Iterable[Any], digits: int = 4) -> dict[Any, str]:
    """`value` of each of `values`. Those that would look the same get more digits or, for texts, the part in which they differ."""
    texts = {one: value(one, digits) for one in values}
    count = Counter(texts.values())
    alike = [one for one, text in texts.items() if count[text] > 1]
    if not alike:
        return texts
    if all(isinstance(one, float) for one in alike):
        return texts | (apart(alike, digits + 1) if digits < 17 else {one: repr(one) for one in alike})
    return texts | dict(zip(alike, _differences([_whole(one) for one in alike]), strict=True))


def _whole(thing: Any) -> str:
    return ", ".join(map(_whole, thing)) if isinstance(thing, list | tuple) else exact(thing) if isinstance(thing, float) else str(thing)


def _differences(texts: Sequence[str]) -> list[str]:
    """`texts` without the words or directory names with which all begin, and those with which all end."""
    parts = [re.split(r"(?<=[/ ])", text) for text in texts]
    start = _alike(parts)
    rests = [one[start:] for one in parts]
    end = _alike([rest[::-1] for rest in rests])
    return ["…" * (start > 0) + "".join(rest[: len(rest) - end]) + "…" * (end > 0) for rest in rests]


def _alike(lists: Sequence[Sequence[str]]) -> int:
    """The number of leading items that `lists` share."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))


def cut(text: str, most: int) -> str:
    """`text` in at most `most` characters: its beginning and its end."""
    return text if len(text) <= most else text[: most - 1 - most // 2] + "…" + text[len(text) - most // 2 :]


def exact(thing: Any) -> str:
    """A config value for a command: all its digits."""
    return repr(thing).replace("e-0", "e-") if isinstance(thing, float) else value(thing)


def _float(number: float, digits: int) -> str:
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    if 1e-3 <= abs(number) < 1e6:
        return f"{number:.{digits}g}" if abs(number) < 10**digits else f"{number:.0f}"
    mantissa, _, exponent = f"{number:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def short(keys: Sequence[str]) -> dict[str, str]:
    """Full key -> the shortest end of it that no other of `keys` has: optimizer.lr -> lr; scheduler.name stays, as `name` alone says too little."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(2 if parts[-1] == "name" and len(parts) > 1 else 1, len(parts) + 1)]
        names[key] = next(end for end in ends if sum(other == end or other.endswith("." + end) for other in keys) == 1 or end == key)
    return names


def decimals(numbers: Iterable[float | None]) -> int:
    """Decimals that distinguish `numbers`: three digits of their range; 3 if there is no range; from 2 to 6."""
    finite = [number for number in numbers if number is not None and math.isfinite(number)]
    span = max(finite) - min(finite) if finite else 0.0
    return min(6, max(2, 2 - math.floor(math.log10(span) + 1e-6))) if span > 0 else 3


HUGE = 1e15
"""Numbers from here on are written with powers of ten."""


def fixed(number: float | None, digits: int) -> str:
    """`number` with `digits` decimals and thousands separated; empty for None. A huge one, such as a diverged perplexity, as 1.23e+45."""
    if number is None or not math.isfinite(number):
        return ""
    return f"{number:,.{digits}f}" if abs(number) < HUGE else f"{number:.3g}"


def compact(number: float) -> str:
    """12345 -> 12.3k: for running text and for axes that start at 0."""
    size, name = unit(number)
    return f"{number / size:.3g}{name}"


def unit(number: float) -> tuple[float, str]:
    """What `compact` divides a number by, and its suffix: (1000, `k`); 999,700 already counts as a million."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) < HUGE and float(f"{abs(number) / size:.3g}") >= 1:
            return size, name
    return 1.0, ""


def bytes_(size: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def duration(seconds: float) -> str:
    """Two units at most: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    seconds = max(0, round(seconds))
    for size, unit, lower, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // lower
            return f"{seconds // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{seconds} s"


def first_line(text: str, width: int = 160) -> str:
    """The first line of an error, cut at `width`."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= width else line[: width - 1] + "…"


def counted(number: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
