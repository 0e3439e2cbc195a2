"""The chat template to train with: the one that is named, or the tokenizer's own, or one of ours in its place.

A template that renders earlier turns differently once others follow cannot be learnt from turn by turn: Qwen3's leaves out earlier thinking. For such
a family there is one of ours, which keeps everything and renders the same bytes wherever the original keeps everything."""

from __future__ import annotations

from pathlib import Path

from xtuner_hydra.data.chat_templates import KEY, ChatTemplate, assistant, is_marked, user
from xtuner_hydra.data.formats import Conversation, Message
from xtuner_hydra.errors import ConfigError

QWEN3 = Path(__file__).with_name("qwen3.jinja").read_text(encoding="utf-8")
FAMILIES = {"qwen3": QWEN3}
"""Templates of ours for training, by the family's name."""


def choose(own: ChatTemplate | None, chosen: str | None, special: dict[str, str], added: tuple[str, ...]) -> ChatTemplate | None:
    """The template to train with: `chosen` (model.chat_template: a family's name or a file), else the tokenizer's `own`, or ours for its family.

    None: there is none. Raises ConfigError for a `chosen` that cannot be had."""
    if chosen in FAMILIES:
        return ChatTemplate(_ours(chosen), FAMILIES[chosen], special, added)
    if chosen is not None:
        return ChatTemplate(chosen, _read(chosen), special, added)
    if own is None or is_marked(own.template) or keeps_prefixes(own):
        return own
    for family in FAMILIES:
        ours = ChatTemplate(_ours(family), FAMILIES[family], special, added)
        if same_where_nothing_is_lost(own, ours):
            return ours
    return own


def keeps_prefixes(template: ChatTemplate) -> bool:
    """Whether a chat of two turns, with thinking, can be learnt turn by turn."""
    messages = [user("a"), assistant("b", thinking="t"), user("c"), assistant("d", thinking="t")]
    try:
        template.spans(Conversation(messages))
    except ValueError:
        return False
    return True


def same_where_nothing_is_lost(one: ChatTemplate, other: ChatTemplate) -> bool:
    """Whether two templates render the same bytes for chats of every kind of which a Qwen3-like template leaves nothing out."""
    try:
        return all(one.render(chat, ask=ask) == other.render(chat, ask=ask) for chat in _probes() for ask in (False, True))
    except ValueError:
        return False


def _probes() -> list[Conversation]:
    system, call = Message("system", "s", supervised=False), {"name": "f", "arguments": {"x": [1, "é"]}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    result = Message("tool", "7", supervised=False)
    looped = [user("a"), assistant("", thinking="t", calls=[call, call]), result, result, assistant("b", thinking="u\n")]
    return [
        Conversation([user("a"), assistant("\nb")]),
        Conversation([system, user("a"), assistant("b", thinking="t")]),
        Conversation([user("a"), assistant("<think>\nt\n</think>\n\nb")]),
        Conversation([user("a"), assistant("b"), user("c"), system, user("d"), assistant("e")]),
        Conversation(looped, tools),
        Conversation([system, *looped[:-1], assistant("w", calls=[call])], tools),
    ]


def _ours(family: str) -> str:
    return f"{family} (ours, for training: it keeps the thinking of earlier turns)"


def _read(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(KEY, path, f"there is no such file; give a .jinja file, or one of {', '.join(FAMILIES)}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(KEY, path, f"cannot be read ({error})") from None
