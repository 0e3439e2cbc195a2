"""Shapes of a line: a decoded JSON value -> a Conversation, or a ValueError with a sentence that says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "pretrain")
SUPERVISED_ROLES = ("assistant", "pretrain")  # XTuner's: the loss is taken on these unless a message says otherwise


@dataclass(frozen=True)
class Message:
    """One turn. `supervised`: whether the loss is taken on it. `tool_calls`: dicts of `name` and `arguments` (an object)."""

    role: str
    content: str
    supervised: bool
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools (JSON schemas) that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def parse_openai(record: object) -> Conversation:
    """OpenAI's chat shape, as XTuner reads it: a list of messages, or an object with `messages` or `dialogs` and perhaps `tools`.

    A message has `role` and `content` (text, a list of text parts, or null beside `tool_calls`) and perhaps `loss`: true or false."""
    tools: object = None
    if isinstance(record, dict):
        tools = record.get("tools")
        keys = [key for key in ("messages", "dialogs") if key in record]
        if len(keys) != 1:
            raise ValueError(f"an object needs `messages` (or `dialogs`), this one has {', '.join(map(repr, record)) or 'nothing'}")
        record = record[keys[0]]
    if not isinstance(record, list):
        raise ValueError(f"expected a list of messages, got {_kind(record)}")
    messages = [_message(number, message) for number, message in enumerate(record, 1)]
    if not any(message.role in SUPERVISED_ROLES for message in messages):
        raise ValueError("a conversation without an assistant turn; there is nothing to learn from it")
    return Conversation(messages, _tools(tools))


FORMATS: dict[str, Callable[[object], Conversation]] = {"openai": parse_openai}


def _message(number: int, message: object) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {number}: expected an object with role and content, got {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number}: role {json.dumps(role, ensure_ascii=False)} is not one of {', '.join(ROLES)}")
    loss = message.get("loss", role in SUPERVISED_ROLES)
    if not isinstance(loss, bool):
        raise ValueError(f"message {number}: loss must be true or false, got {_kind(loss)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"message {number}: tool_calls must be a list, got {_kind(calls)}")
    calls = [_call(number, call) for call in calls]
    return Message(role, _content(number, message.get("content"), has_calls=bool(calls)), loss, calls)


def _content(number: int, content: object, *, has_calls: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and has_calls:
        return ""
    if isinstance(content, list):
        return "".join(_part(number, part) for part in content)
    raise ValueError(f"message {number}: content must be text, got {_kind(content)}")


def _part(number: int, part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"message {number}: a content part of type {kind!r}; only text can be trained on")


def _call(number: int, call: object) -> dict[str, Any]:
    """{"name", "arguments"} of a tool call; OpenAI wraps them in `function` and writes the arguments as a JSON string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number}: a tool call needs a function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"message {number}: arguments of tool call {function['name']} are not JSON ({error})") from None
    return {"name": function["name"], "arguments": arguments}


def _tools(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of objects")
    return tools


def _kind(value: object) -> str:
    """JSON's word for the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
