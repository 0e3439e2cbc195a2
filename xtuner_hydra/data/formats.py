"""Shapes of a record: a decoded JSON value -> a Conversation or a Text, or a ValueError with a sentence that says what is wrong with it.

EmptyRecord is the ValueError for a record in which nothing is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "pretrain")
SUPERVISED_ROLES = ("assistant", "pretrain")  # XTuner's: the loss is taken on these unless a message says otherwise
_UNREAD = {"function_call": "give it as one of `tool_calls`", "refusal": "give its text as `content`"}
_RENDERING = "chat_template_kwargs"  # TRL's, beside the messages
_OTHER_MASKS = ("train", "training", "loss_mask")  # by which others say what is learnt
_MEDIA = ("images", "image", "videos", "audios")  # beside a conversation whose text has places for them
_THINKING = ("reasoning_content", "thinking", "reasoning")  # names that transformers reads, the usual one first


@dataclass(frozen=True)
class Message:
    """One turn. `supervised`: whether the loss is taken on it.

    tool_calls: dicts of `name` and `arguments` (an object); call_ids: their ids, None where the data has none. thinking: what the assistant
    thought before `content`. name, tool_call_id: of the tool, and of the call, that a `tool` message answers."""

    role: str
    content: str
    supervised: bool
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    call_ids: list[str | None] = field(default_factory=list)
    thinking: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools (JSON schemas) that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """Text without a chat template: pieces (text, supervised) that follow each other. An EOS ends it, supervised like the last piece."""

    pieces: list[tuple[str, bool]]


Sample = Conversation | Text
Format = Callable[[object], Sample]


class EmptyRecord(ValueError):
    """A record without a character to learn from."""


def parse_openai(record: object) -> Conversation:
    """OpenAI's chat shape, as XTuner reads it: a list of messages, or an object with `messages` or `dialogs` and perhaps `tools`.

    A message has `role` and `content` (text, a list of text parts, or null beside `tool_calls` or thinking), perhaps `reasoning_content`, and
    perhaps `loss`: true or false, or OpenAI's `weight`: 1 or 0. An object may have `system`, which comes first."""
    tools: object = None
    system: list[Message] = []
    if isinstance(record, dict):
        tools, system = record.get("tools"), _system(record)
        if record.get("functions"):
            raise ValueError("`functions` is an old form; give `tools`")
        _refuse_unread(record)
        keys = [key for key in ("messages", "dialogs") if key in record]
        if len(keys) != 1:
            raise ValueError(f"an object needs `messages` (or `dialogs`), this one has {_keys(record)}")
        record = record[keys[0]]
    return _conversation(system + _messages(record), tools)


def parse_sharegpt(record: object) -> Conversation:
    """ShareGPT's shape: an object with `conversations`, a list of `from` and `value`, and perhaps `system` and `tools`.

    `from` is human or user, gpt or assistant, system, function_call (a call as JSON), or function, tool or observation (its result)."""
    turns = _field(record, "conversations", list, "a list of turns")
    _refuse_unread(record)
    messages = [_sharegpt_message(number, turn) for number, turn in enumerate(turns, 1)]
    return _conversation(_system(record) + messages, _maybe_json("tools", _get(record, "tools")))


def parse_alpaca(record: object) -> Conversation:
    """Alpaca's shape: `instruction`, perhaps `input` (added after a blank line), and `output`.

    Perhaps `system`, and `history`: [question, answer] pairs that came before."""
    instruction, output = _field(record, "instruction", str, "text"), _field(record, "output", str, "text")
    _refuse_unread(record)
    context = _get(record, "input") or ""
    if not isinstance(context, str):
        raise ValueError(f"input must be text, got {_kind(context)}")
    question = "\n\n".join(part for part in (instruction, context) if part)
    turns = [*_history(_get(record, "history")), (question, output)]
    return _conversation(_system(record) + [message for turn in turns for message in _exchange(*turn)], None)


def parse_prompt_completion(record: object) -> Sample:
    """`prompt` and `completion`: both text (no chat template; loss on the completion and an EOS), or both messages (loss on the latter)."""
    if not isinstance(record, dict) or not {"prompt", "completion"} <= record.keys():
        raise ValueError(f"expected an object with prompt and completion, got {_described(record)}")
    _refuse_unread(record)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return as_text([(prompt, False), (completion, True)])
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError(f"prompt and completion must both be text or both lists of messages, got {_kind(prompt)} and {_kind(completion)}")
    asked = [{**message, "loss": False, "weight": None} if isinstance(message, dict) else message for message in prompt]
    return _conversation(_messages(asked + completion), record.get("tools"))


def parse_text(record: object) -> Text:
    """A document: an object with `text` or `content`, or bare text."""
    if isinstance(record, str):
        return _document(record)
    keys = [key for key in ("text", "content") if isinstance(record, dict) and key in record]
    if len(keys) != 1:
        raise ValueError(f"expected an object with `text` (or `content`), got {_described(record)}")
    return _document(_field(record, keys[0], str, "text"))


PARSERS: dict[str, Format] = {
    "openai": parse_openai,
    "sharegpt": parse_sharegpt,
    "alpaca": parse_alpaca,
    "prompt_completion": parse_prompt_completion,
    "text": parse_text,
}


def fitting(record: object) -> list[str]:
    """The formats that read `record`."""
    names = []
    for name, parse in PARSERS.items():
        with suppress(ValueError, RecursionError):
            parse(record)
            names.append(name)
    return names


def holds_nul(sample: Sample) -> bool:
    """Whether the character U+0000 is somewhere in the texts of a sample, its tool calls and tools included."""
    if isinstance(sample, Text):
        return any("\0" in text for text, _ in sample.pieces)
    pending: list[object] = [*sample.tools]
    for message in sample.messages:
        pending += [message.content, message.thinking, *message.tool_calls]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and "\0" in value:
            return True
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            pending += value
    return False


def _conversation(messages: list[Message], tools: object) -> Conversation:
    refuse_silence(messages)
    if not any(message.role in SUPERVISED_ROLES for message in messages):
        raise ValueError("a conversation without an assistant turn; there is nothing to learn from it")
    return Conversation(messages, _tools(tools))


def refuse_silence(messages: list[Message]) -> None:
    """EmptyRecord where nothing is said."""
    if not any(message.content or message.tool_calls or message.thinking for message in messages):
        raise EmptyRecord("no message says anything" if messages else "a conversation without a message")


def _refuse_unread(record: object) -> None:
    """ValueError for what others train on, or render by, and we do not."""
    if _get(record, _RENDERING):
        raise ValueError(f"`{_RENDERING}` is not read; give a template with these values in it with model.chat_template=PATH")
    if found := [key for key in _MEDIA if _get(record, key)]:
        raise ValueError(f"`{found[0]}` is not read; only text can be trained on")


def _document(text: str) -> Text:
    return as_text([(text, True)])


def as_text(pieces: list[tuple[str, bool]]) -> Text:
    """A Text of `pieces`; EmptyRecord where there is no character in them."""
    if not any(text for text, _ in pieces):
        raise EmptyRecord("the text is empty")
    return Text(pieces)


def _messages(record: object) -> list[Message]:
    if not isinstance(record, list):
        raise ValueError(f"expected a list of messages, got {_kind(record)}")
    if any(isinstance(one, dict) and "role" not in one and isinstance(one.get("messages"), list) for one in record):
        raise ValueError("this is a list of whole records, not of messages; a file that holds one JSON array is named .json")
    return [_message(number, message) for number, message in enumerate(record, 1)]


def _message(number: int, message: object) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {number}: expected an object with role and content, got {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number}: role {json.dumps(role, ensure_ascii=False)} is not one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"message {number}: tool_calls must be a list, got {_kind(calls)}")
    thinking = next((message[key] for key in _THINKING if message.get(key) is not None), None)
    for key, instead in _UNREAD.items():
        if message.get(key) is not None:
            raise ValueError(f"message {number}: `{key}` is not read; {instead}")
    return Message(
        role,
        _content(number, message.get("content"), may_be_null=bool(calls or thinking)),
        _loss(number, message, role),
        [_call(number, call) for call in calls],
        [_call_id(call) for call in calls],
        thinking=_text_or_none(number, "reasoning_content", thinking),
        name=_text_or_none(number, "name", message.get("name")),
        tool_call_id=_text_or_none(number, "tool_call_id", message.get("tool_call_id")),
    )


def _loss(number: int, message: dict[str, Any], role: str) -> bool:
    """Whether `message` is learnt: what its `loss` or `weight` says (null, as Parquet fills gaps, says nothing), else what its role does."""
    loss, weight = message.get("loss"), message.get("weight")
    if other := next((key for key in _OTHER_MASKS if message.get(key) is not None), None):
        raise ValueError(f"message {number}: `{other}` is not read; say whether a message is learnt with `loss`, true or false")
    if loss is None and weight is None:
        return role in SUPERVISED_ROLES
    if loss is None:
        if weight not in (0, 1):
            raise ValueError(f"message {number}: weight must be 0 or 1, got {json.dumps(weight)}")
        return bool(weight)
    if not isinstance(loss, bool):
        raise ValueError(f"message {number}: loss must be true or false, got {_kind(loss)}")
    if weight is not None and weight != loss:
        raise ValueError(f"message {number}: loss {json.dumps(loss)} and weight {json.dumps(weight)} contradict each other")
    return loss


def _content(number: int, content: object, *, may_be_null: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_null:
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
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number}: a tool call needs a function with a name")
    arguments = {} if function.get("arguments") is None else function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=_no_json)
        except ValueError as error:
            raise ValueError(f"message {number}: arguments of tool call {function['name']} are not JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"message {number}: arguments of tool call {function['name']} must be an object, got {_kind(arguments)}")
    _refuse_non_json(f"message {number}: arguments of tool call {function['name']}", arguments)
    return {"name": function["name"], "arguments": arguments}


def _no_json(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _refuse_non_json(what: str, value: object) -> None:
    """ValueError for NaN and infinities, which Python reads and writes, and the model would learn."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        raise ValueError(f"{what} hold NaN or Infinity, which are not JSON") from None


def _call_id(call: Any) -> str | None:
    identity = call.get("id")
    return identity if isinstance(identity, str) else None


def _tools(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of objects")
    _refuse_non_json("tools", tools)
    return tools


_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "tool": "tool",
    "observation": "tool",
}


def _sharegpt_message(number: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number}: expected an object with from and value, got {_kind(turn)}")
    speaker, value = turn.get("from"), turn.get("value")
    role = _SHAREGPT.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"turn {number}: from {json.dumps(speaker, ensure_ascii=False)} is not one of {', '.join(_SHAREGPT)}")
    if not isinstance(value, str):
        raise ValueError(f"turn {number}: value must be text, got {_kind(value)}")
    if speaker != "function_call":
        return Message(role, value, _loss(number, turn, role))
    call = _maybe_json(f"turn {number}: function_call", value)
    calls = call if isinstance(call, list) else [call]
    return Message(role, "", _loss(number, turn, role), [_call(number, one) for one in calls])


def _maybe_json(name: str, value: object) -> object:
    """`value`, read as JSON where it is text."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value or None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error})") from None


def _system(record: object) -> list[Message]:
    """The system message of a record that has `system` beside its turns."""
    system = _get(record, "system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system must be text, got {_kind(system)}")
    return [Message("system", system, supervised=False)] if system else []


def _history(history: object) -> list[tuple[str, str]]:
    pairs = history or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise ValueError("history must be a list of [question, answer] pairs")
    return [(question, answer) for question, answer in pairs]


def _exchange(question: str, answer: str) -> list[Message]:
    return [Message("user", question, supervised=False), Message("assistant", answer, supervised=True)]


def _field(record: object, name: str, kind: type, word: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"expected an object with {name}, got {_described(record)}")
    if not isinstance(record[name], kind):
        raise ValueError(f"{name} must be {word}, got {_kind(record[name])}")
    return record[name]


def _get(record: object, name: str) -> object:
    return record.get(name) if isinstance(record, dict) else None


def _text_or_none(number: int, name: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"message {number}: {name} must be text, got {_kind(value)}")


def _described(record: object) -> str:
    return f"one with {_keys(record)}" if isinstance(record, dict) else _kind(record)


def _keys(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "nothing"


def _kind(value: object) -> str:
    """JSON's word for the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
