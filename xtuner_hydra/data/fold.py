"""Tools, calls, results and thinking written into the text of the turns, for templates that have no place for them.

As Qwen's models have them: tools in the system turn, a call as JSON in <tool_call>, its result in a user turn, thinking in <think>."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from xtuner_hydra.data.formats import Conversation, Message

TOOLS_END = 'To call one, write {"name", "arguments"} as JSON inside <tool_call></tool_call>.'
"""The last words on the tools."""


def fold(conversation: Conversation, *, tools: bool, thinking: bool) -> Conversation:
    """`conversation` with its tools and all that belongs to them, or its thinking, in the text."""
    messages = conversation.messages
    if tools:
        messages = [_fold_tools(message) for message in messages]
        messages = _with_system(messages, _listed(conversation.tools)) if conversation.tools else messages
    if thinking:
        messages = [_fold_thinking(message) for message in messages]
    return Conversation(messages, [] if tools else conversation.tools)


def _fold_thinking(message: Message) -> Message:
    if not message.thinking:
        return message
    return replace(message, content=f"<think>\n{message.thinking}\n</think>\n\n{message.content}", thinking=None)


def _fold_tools(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>", message.supervised)
    if not message.tool_calls:
        return message
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in message.tool_calls]
    return replace(message, content="\n".join(([message.content] if message.content else []) + calls), tool_calls=[], call_ids=[])


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """`messages` with `text` at the end of the system turn, which is made where there is none."""
    if messages[0].role not in ("system", "developer"):
        return [Message("system", text, supervised=False), *messages]
    return [replace(messages[0], content=f"{messages[0].content}\n\n{text}".lstrip("\n")), *messages[1:]]


def _listed(tools: list[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    head = f"Tools you may call, one JSON schema a line:\n<tools>\n{listed}\n</tools>\n"
    return head + TOOLS_END
