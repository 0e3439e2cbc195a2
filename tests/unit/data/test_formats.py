import json
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xtuner_hydra.config import schema
from xtuner_hydra.data.formats import (
    PARSERS,
    Conversation,
    Text,
    fitting,
    parse_alpaca,
    parse_openai,
    parse_prompt_completion,
    parse_sharegpt,
    parse_text,
)

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


def test_weights_switch_a_message_on_and_off_as_at_openai():
    messages = parse_openai([USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}, {**ANSWER, "weight": None}]).messages
    assert [message.supervised for message in messages] == [False, False, False, True, True]
    with pytest.raises(ValueError, match=r"message 2: weight must be 0 or 1, got 0\.5"):
        parse_openai([USER, {**ANSWER, "weight": 0.5}])
    with pytest.raises(ValueError, match="message 2: loss true and weight 0 contradict each other"):
        parse_openai([USER, {**ANSWER, "loss": True, "weight": 0}])


def test_the_system_text_of_a_record_comes_first():
    messages = parse_openai({"system": "Be kind.", "messages": [USER, ANSWER]}).messages
    assert [(message.role, message.content) for message in messages][:2] == [("system", "Be kind."), ("user", "Hi")]
    assert len(parse_openai({"system": "", "messages": [USER, ANSWER]}).messages) == 2


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([USER, {**ANSWER, "content": "", "function_call": {"name": "f", "arguments": "{}"}}], "message 2: `function_call` is not read"),
        ([USER, {**ANSWER, "content": "", "refusal": "I cannot."}], "message 2: `refusal` is not read"),
        ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, "`functions` is an old form; give `tools`"),
        ({"messages": [USER, ANSWER], "images": ["cat.png"]}, "`images` is not read; only text"),
        ([{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}], "a file that holds one JSON array is named .json"),
    ],
)
def test_what_would_be_lost_is_refused(record, words):
    with pytest.raises(ValueError, match=words):
        parse_openai(record)


def test_an_answer_may_be_thinking_alone():
    answer = parse_openai([USER, {"role": "assistant", "content": None, "reasoning_content": "Hm."}]).messages[1]
    assert (answer.content, answer.thinking) == ("", "Hm.")


def test_an_instruction_may_stand_in_the_input_alone():
    assert parse_alpaca({"instruction": "", "input": "2 + 2?", "output": "4"}).messages[0].content == "2 + 2?"


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


@pytest.mark.parametrize("call", [{"name": "now"}, {"name": "now", "arguments": None}, {"function": {"name": "now", "arguments": {}}}])
def test_a_call_without_arguments_has_an_empty_object(call):
    assert parse_openai([USER, {"role": "assistant", "content": None, "tool_calls": [call]}]).messages[1].tool_calls == [
        {"name": "now", "arguments": {}}
    ]


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
        ([USER, {**ANSWER, "train": False}], "message 2: `train` is not read; say whether a message is learnt with `loss`"),
        ([USER, {**ANSWER, "content": None, "tool_calls": 5}], "message 2: tool_calls must be a list, got a number"),
        ([USER, {**ANSWER, "content": ["Hello."]}], "message 2: a content part of type 'text'"),
        ([USER, {**ANSWER, "tool_calls": [{"id": 1}]}], "message 2: a tool call needs a function with a name"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}], "message 2: arguments of tool call f are not JSON"),
        ({"messages": [USER, ANSWER], "tools": "add"}, "tools must be a list"),
        ([USER], "without an assistant turn"),
        ([], "a conversation without a message"),
        ([{**USER, "content": ""}, {**ANSWER, "content": ""}], "no message says anything"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40],
)
def test_what_is_wrong_is_said(record, words):
    with pytest.raises(ValueError, match=r".") as error:
        parse_openai(record)
    assert words in str(error.value)


WORDS = st.sampled_from(
    ["messages", "dialogs", "tools", "role", "content", "loss", "tool_calls", "function", "name", "arguments", "type", "text"]
) | st.sampled_from(["conversations", "from", "value", "instruction", "input", "output", "history", "system", "prompt", "completion"])
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


def turns(conversation):
    return [(message.role, message.content, message.supervised) for message in conversation.messages]


def test_thinking_names_and_ids_come_along():
    record = [
        {**ANSWER, "reasoning_content": "hm", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {}}}, {"name": "g"}]},
        {"role": "tool", "content": "7", "name": "f", "tool_call_id": "c1"},
    ]
    answer, result = parse_openai(record).messages
    assert (answer.thinking, answer.call_ids) == ("hm", ["c1", None])
    assert (result.name, result.tool_call_id) == ("f", "c1")
    assert parse_openai([{**ANSWER, "thinking": "hm"}]).messages == parse_openai([{**ANSWER, "reasoning": "hm"}]).messages


def test_null_means_absent_as_parquet_fills_gaps():
    filled = {"messages": [{**USER, "loss": None, "tool_calls": None, "name": None}, {**ANSWER, "reasoning_content": None}], "tools": None}
    assert parse_openai(filled) == parse_openai([USER, ANSWER])


def test_sharegpt_names():
    record = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2."},
            {"from": "user", "value": "Sure?"},
            {"from": "assistant", "value": "Yes.", "loss": False},
        ],
        "tools": '[{"name": "add"}]',
    }
    conversation = parse_sharegpt(record)
    assert turns(conversation) == [
        ("system", "Be brief.", False),
        ("user", "1+1?", False),
        ("assistant", "", True),
        ("tool", "2", False),
        ("assistant", "2.", True),
        ("user", "Sure?", False),
        ("assistant", "Yes.", False),
    ]
    assert conversation.messages[2].tool_calls == [{"name": "add", "arguments": {"a": 1}}]
    assert conversation.tools == [{"name": "add"}]


@pytest.mark.parametrize("name", ["function", "tool", "observation"])
def test_sharegpt_has_several_names_for_a_result(name):
    record = {"conversations": [{"from": name, "value": "2"}, {"from": "gpt", "value": "x"}]}
    assert parse_sharegpt(record).messages[0].role == "tool"


def test_alpaca_is_a_chat():
    record = {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "S", "history": [["q", "a"]]}
    assert turns(parse_alpaca(record)) == [
        ("system", "S", False),
        ("user", "q", False),
        ("assistant", "a", True),
        ("user", "Add.\n\n1 and 1", False),
        ("assistant", "2", True),
    ]
    assert turns(parse_alpaca({"instruction": "Add.", "input": "", "output": "2"}))[0] == ("user", "Add.", False)


def test_prompt_and_completion_are_text_or_messages():
    assert parse_prompt_completion({"prompt": "a", "completion": "b"}) == Text([("a", False), ("b", True)])
    chat = parse_prompt_completion({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert [message.supervised for message in chat.messages] == [False, False, False, True]


@pytest.mark.parametrize("record", [{"text": "a b"}, {"content": "a b", "url": "x"}, "a b"])
def test_a_document(record):
    assert parse_text(record) == Text([("a b", True)])


@pytest.mark.parametrize(
    ("parse", "record", "words"),
    [
        (parse_sharegpt, {"messages": []}, "expected an object with conversations, got one with 'messages'"),
        (parse_sharegpt, {"conversations": {}}, "conversations must be a list of turns, got an object"),
        (parse_sharegpt, {"conversations": [3]}, "turn 1: expected an object with from and value"),
        (parse_sharegpt, {"conversations": [{"from": "robot", "value": "x"}]}, 'turn 1: from "robot" is not one of'),
        (parse_sharegpt, {"conversations": [{"from": "gpt", "value": None}]}, "turn 1: value must be text, got null"),
        (parse_sharegpt, {"conversations": [{"from": "function_call", "value": "{"}]}, "turn 1: function_call is not JSON"),
        (parse_sharegpt, {"conversations": [{"from": "human", "value": "x"}]}, "without an assistant turn"),
        (parse_sharegpt, {"conversations": [{"from": "gpt", "value": "x"}], "tools": "{"}, "tools is not JSON"),
        (parse_sharegpt, {"conversations": [], "system": 3}, "system must be text"),
        (parse_alpaca, {"instruction": "x"}, "expected an object with output"),
        (parse_alpaca, {"instruction": "x", "output": 3}, "output must be text, got a number"),
        (parse_alpaca, {"instruction": "x", "output": "y", "input": {}, "history": [["q"]]}, "history must be a list of"),
        (parse_prompt_completion, {"prompt": "x"}, "expected an object with prompt and completion"),
        (parse_prompt_completion, {"prompt": "x", "completion": [ANSWER]}, "must both be text or both lists of messages"),
        (parse_sharegpt, {"conversations": [{"from": "gpt", "value": "x"}], "videos": ["cat.mp4"]}, "`videos` is not read"),
        (parse_alpaca, {"instruction": "x", "output": "y", "image": "cat.png"}, "`image` is not read"),
        (parse_text, {"body": "x"}, "expected an object with `text` (or `content`), got one with 'body'"),
        (parse_text, {"text": ["x"]}, "text must be text, got a list"),
        (parse_sharegpt, {"conversations": []}, "a conversation without a message"),
        (parse_alpaca, {"instruction": "", "output": ""}, "no message says anything"),
        (parse_prompt_completion, {"prompt": "", "completion": ""}, "the text is empty"),
        (parse_text, {"text": ""}, "the text is empty"),
        (parse_text, ["x"], "got a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40] if not callable(value) else value.__name__,
)
def test_what_is_wrong_with_other_shapes_is_said(parse, record, words):
    with pytest.raises(ValueError, match=r".") as error:
        parse(record)
    assert words in str(error.value)


def test_the_schema_knows_the_formats():
    assert tuple(PARSERS) == schema.FORMATS


@pytest.mark.parametrize("value", [float("nan"), [1, float("-inf")]])
def test_what_is_no_json_is_not_learnt(value):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": value}}}]}
    with pytest.raises(ValueError, match="message 2: arguments of tool call f hold NaN or Infinity"):
        parse_openai([USER, call])
    with pytest.raises(ValueError, match="tools hold NaN or Infinity"):
        parse_openai({"messages": [USER, ANSWER], "tools": [{"name": "f", "default": value}]})


@settings(deadline=None)
@given(JSON)
@pytest.mark.parametrize("name", PARSERS)
def test_any_json_is_read_or_refused_with_a_value_error(name, record):
    with suppress(ValueError):
        assert isinstance(PARSERS[name](record), Conversation | Text)


def test_weights_in_a_prompt_say_nothing():
    chat = parse_prompt_completion({"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]})
    assert [message.supervised for message in chat.messages] == [False, False, False, True]


def test_values_for_a_template_beside_the_messages_are_refused():
    with pytest.raises(ValueError, match="`chat_template_kwargs` is not read"):
        parse_openai({"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}})
    assert parse_openai({"messages": [USER, ANSWER], "chat_template_kwargs": None}).messages


def test_formats_that_read_a_record_are_found():
    assert fitting({"instruction": "a", "output": "b"}) == ["alpaca"]
    assert fitting({"messages": [USER, ANSWER]}) == fitting([USER, ANSWER]) == ["openai"]
    assert fitting({"nothing": 1}) == []
