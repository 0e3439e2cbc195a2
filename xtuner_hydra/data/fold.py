"""Write tools, calls, results and thinking into the text of the turns, for templates that have no place for them.

As Qwen's models have them: tools in the system turn, a call as JSON in <tool_call>, its result in a user turn, thinking in <think>."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from xtuner_hydra.data.formats import Conversation, Message

TOOLS_HEAD = "Tools you may call, one JSON schema a line:\n<tools>\n"
TOOLS_END = 'To call one, write {"name", "arguments"} as JSON inside <tool_call></tool_call>.'
"""The last words on the tools."""

MACROS = (
    r"""
{%- macro text(message) -%}
    {%- if message.content is string -%}{{ message.content }}{%- else -%}
        {%- for part in message.content or [] -%}{{ part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro body(message) -%}
    {%- set thinking = message.reasoning_content or message.thinking or message.reasoning -%}
    {%- set said = text(message) -%}
    {%- if message.role == 'tool' -%}
        {{- '<tool_response>\n' + said + '\n</tool_response>' -}}
    {%- else -%}
        {%- if thinking -%}{{- '<think>\n' + thinking + '\n</think>\n\n' -}}{%- endif -%}
        {{- said -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\n' if said or not loop.first -}}
            {{- '<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string else (function.arguments or {}) | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro listed(tools) -%}
    {{- '"""
    + TOOLS_HEAD.replace("\n", r"\n")
    + r"""' -}}
    {%- for tool in tools -%}{{- (tool | tojson) + '\n' -}}{%- endfor -%}
    {{- '</tools>\n"""
    + TOOLS_END
    + r"""' -}}
{%- endmacro -%}
{%- set roles = {'developer': 'system', 'pretrain': 'assistant', 'tool': 'user'} -%}
{%- set opens = messages and messages[0].role in ('system', 'developer') -%}
"""
)
"""The same in Jinja, for an export: `body(message)` is the text of a message, `listed(tools)` goes to the end of the system turn, which `opens`
says whether there is; roles are those of `roles` where they have another name there."""


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
    return [replace(messages[0], content=f"{messages[0].content}\n\n{text}" if messages[0].content else text), *messages[1:]]


def _listed(tools: list[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"{TOOLS_HEAD}{listed}\n</tools>\n{TOOLS_END}"
