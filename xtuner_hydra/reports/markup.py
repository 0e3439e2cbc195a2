"""HTML and SVG as nested calls. Anything that is not yet markup is text and is escaped, so no override or error message can become a tag."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML."""


Content = str | int | float | None | Iterable["Content"]
VOID = frozenset({"br", "meta", "path", "line", "rect", "circle", "use", "col"})
"""Elements without content; HTML's own, and those of SVG, which close themselves."""


def tag(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """`<name attributes>content</name>`. Attributes: `class_` and `for_` lose their underscore, others turn theirs into `-`; None and False are left
    out, True stands alone."""
    text = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{text}>" if name in ("br", "meta", "col") else f"<{name}{text}/>")
    return Markup(f"<{name}{text}>{join(*content)}</{name}>")


def join(*content: Content) -> Markup:
    """The parts one after another; None is nothing, a list its items."""
    return Markup("".join(_escaped(part) for part in content))


def _escaped(part: Content) -> str:
    if isinstance(part, Markup):
        return part
    if part is None:
        return ""
    if isinstance(part, str | int | float):
        return html.escape(str(part))
    return "".join(_escaped(item) for item in part)


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
