"""The parts of all pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from xtuner_hydra import words
from xtuner_hydra.reports.markup import Content, Markup, join, tag
from xtuner_hydra.reports.style import CSS, SCRIPT

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""Makes the browser refuse to load anything from elsewhere."""


def document(title: str, *body: Content) -> str:
    """A whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *body), tag("script", Markup(SCRIPT))), lang="en") + "\n"


def card(title: str, *content: Content, sub: str = "") -> Markup:
    """A box with a heading and, below it, a line on how to read it."""
    return tag("section", tag("h2", title), tag("p", sub, class_="sub") if sub else None, *content, class_="card")


def folded(title: str, *content: Content) -> Markup:
    """A box that opens on a click."""
    return tag("section", tag("details", tag("summary", title), *content), class_="card")


def group(cards: Sequence[Markup], kind: str = "pair") -> Markup:
    """Boxes side by side if there is room."""
    return tag("div", cards, class_=kind) if len(cards) > 1 else join(*cards)


@dataclass(frozen=True)
class Cell:
    """A cell of a table. value: the key to sort by."""

    content: Content
    value: Any = None
    number: bool = False
    kind: str = ""


def number(value: float | None, digits: int) -> Cell:
    """A number, right-aligned."""
    return Cell(words.fixed(value, digits), value, number=True)


def swept(value: Any, text: str) -> Cell:
    """A config value as `text`, right-aligned if it is a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(text, value if is_number else text, number=is_number)


def state(name: str) -> Cell:
    """A state with its sign."""
    return Cell(tag("span", name, class_=f"state {name.split()[-1]}"), name)


def bar(value: float | None, most: float, digits: int) -> Cell:
    """A number with a bar that shows its share of `most`."""
    share = 100 * value / most if value is not None and most > 0 else 0
    return Cell(tag("div", tag("i", style=f"width:{share:.1f}%"), tag("span", words.fixed(value, digits)), class_="bar"), value)


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    kinds: Sequence[str] = (),
    jobs: Sequence[str] = (),
    sortable: bool = True,
    kind: str = "",
    most: int | None = None,
) -> Markup:
    """A table that scrolls inside its own box. kinds: a CSS class per row. jobs: the numbers of each row's jobs, which light up with it.
    most: how many rows are shown at first, if there are many."""
    columns = [any(row[column].number for row in rows) for column in range(len(heads))]
    head = [
        tag("th", tag("button", text, type="button") if sortable and text else text, class_="n" if right else None, scope="col")
        for text, right in zip(heads, columns, strict=True)
    ]
    body = [
        tag("tr", [_cell(cell) for cell in row], class_=kinds[i] or None if kinds else None, data_job=jobs[i] if jobs else None)
        for i, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_=kind or None, data_most=most), class_="scroll")


def _cell(cell: Cell) -> Markup:
    kinds = " ".join(filter(None, [cell.kind, "n" if cell.number else ""]))
    value = None if cell.value is None else repr(cell.value) if isinstance(cell.value, float) else str(cell.value)
    return tag("td", cell.content, class_=kinds or None, data_v=value)


def pairs(rows: Sequence[tuple[str, Content]]) -> Markup:
    """Names with their values."""
    return tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in rows])


def command(text: str) -> Markup:
    """A command to copy."""
    return tag("div", tag("pre", text), tag("button", "copy", type="button"), class_="command")


def link(target: Path, start: Path, text: str) -> Markup:
    """A relative link to a file, which still works if both are moved together. start: the directory of the page."""
    return tag("a", text, href=quote(Path(os.path.relpath(target, start)).as_posix()))


def note(title: str, items: Sequence[str]) -> Markup | None:
    """Sentences that must not be overlooked; nothing if there are none."""
    if not items:
        return None
    body = tag("ul", [tag("li", item) for item in items]) if len(items) > 1 else tag("p", items[0])
    return tag("div", tag("b", title), body, class_="note")


def fact(title: str, text: str, kind: str = "") -> Markup:
    """One of the facts that a reader wants first."""
    return tag("div", tag("b", title), tag("span", text), class_=f"fact {kind}".strip())


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """The meaning of colours and signs: (CSS classes of a line, or a sign, text)."""
    return tag(
        "div", [tag("span", tag("b", sign) if len(sign) == 1 else tag("i", class_=sign), text) for sign, text in entries], class_="legend"
    )
