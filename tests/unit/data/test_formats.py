import json
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xtuner_hydra.data.formats import parse_openai

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize("record", [[USER, ANSWER], {"messages": [USER, ANSWER]}, {"dialogs": [USER, ANSWER], "id": 7}])
def test_a_bare_list_messages_and_dialogs_mean_the_same(record):
    messages = parse_openai(record).messages
    assert [(message.role, message.content, message.supervised) for message in messages] == [
        ("user", "Hi", False),
        ("assistant", "Hello.", True),
    ]


def test_loss_switches_a_message_on_and_off():
    messages = parse_openai([{**USER, "loss": True}, {**ANSWER, "loss": False}, ANSWER]).messages
    assert [message.supervised for message in messages] == [True, False, True]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    assert parse_openai([USER, {"role": "assistant", "content": parts}]).messages[1].content == "Hello."


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"function": {"name": "add", "arguments": {"a": 1}}},
        {"name": "add", "arguments": {"a": 1}},
    ],
)
def test_tool_calls_with_null_content(call):
    tools = [{"type": "function", "function": {"name": "add"}}]
    conversation = parse_openai({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools})
    assert conversation.messages[1].content == ""
    assert conversation.messages[1].tool_calls == [{"name": "add", "arguments": {"a": 1}}]
    assert conversation.tools == tools


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (3, "expected a list of messages, got a number"),
        ({"text": "x"}, "'text'"),
        ({}, "nothing"),
        ({"messages": [], "dialogs": []}, "messages"),
        ([3], "message 1: expected an object"),
        ([{"role": "robot", "content": "x"}], 'message 1: role "robot"'),
        ([{"content": "x"}], "message 1: role null"),
        ([USER, {"role": "assistant", "content": 3}], "message 2: content must be text, got a number"),
        ([USER, {"role": "assistant", "content": None}], "message 2: content must be text, got null"),
        ([USER, {"role": "assistant"}], "message 2: content must be text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER], "message 1: a content part of type 'image_url'"),
        ([USER, {**ANSWER, "loss": "yes"}], "message 2: loss must be true or false, got text"),
        ([USER, {**ANSWER, "content": None, "tool_calls": 5}], "message 2: tool_calls must be a list, got a number"),
        ([USER, {**ANSWER, "content": ["Hello."]}], "message 2: a content part of type 'text'"),
        ([USER, {**ANSWER, "tool_calls": [{"id": 1}]}], "message 2: a tool call needs a function with a name"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}], "message 2: arguments of tool call f are not JSON"),
        ({"messages": [USER, ANSWER], "tools": "add"}, "tools must be a list"),
        ([USER], "without an assistant turn"),
        ([], "without an assistant turn"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40],
)
def test_what_is_wrong_is_said(record, words):
    with pytest.raises(ValueError, match=r".") as error:
        parse_openai(record)
    assert words in str(error.value)


WORDS = st.sampled_from(
    ["messages", "dialogs", "tools", "role", "content", "loss", "tool_calls", "function", "name", "arguments", "type", "text"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "text", "{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=30,
)


@settings(deadline=None)
@given(JSON | st.lists(st.fixed_dictionaries({"role": st.just("assistant"), "content": JSON, "tool_calls": JSON}), min_size=1))
@example([{"role": "assistant", "content": "a", "tool_calls": True}])
def test_any_json_is_a_conversation_or_refused_with_a_value_error(record):
    with suppress(ValueError):
        conversation = parse_openai(record)
        assert all(isinstance(message.content, str) for message in conversation.messages)
        assert any(message.role in ("assistant", "pretrain") for message in conversation.messages)
