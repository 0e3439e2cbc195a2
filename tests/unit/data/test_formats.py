import json
import sys
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xtuner_hydra.config import schema
from xtuner_hydra.data.formats import (
    FORMATS,
    Conversation,
    Text,
    find_format,
    format_identity,
    parse_alpaca,
    parse_openai,
    parse_prompt_completion,
    parse_sharegpt,
    parse_text,
)
from xtuner_hydra.errors import ConfigError

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
    assert tuple(FORMATS) == schema.FORMATS


MODULE = """
from xtuner_hydra.data.formats import Text

def question(record):
    return [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]

def document(record):
    return record["a"]

def pair(record):
    return Text([(record["q"], False), (record["a"], True)])

class Swapped:
    def __call__(self, record):
        return question({"q": record["a"], "a": record["q"]})

swapped = Swapped()
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_formats", "my_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "my_formats.py").write_text(MODULE)
    return tmp_path / "my_formats.py"


def test_a_format_of_the_user_s(module):
    record = {"q": "Hi", "a": "Hello."}
    assert find_format("my_formats:question")(record) == parse_openai([USER, ANSWER])
    assert find_format("my_formats:document")(record) == Text([("Hello.", True)])
    assert find_format("my_formats:swapped")({"q": "Hello.", "a": "Hi"}) == parse_openai([USER, ANSWER])
    assert find_format("my_formats:pair")(record) == Text([("Hi", False), ("Hello.", True)])
    with pytest.raises(ValueError, match=r"my_formats:question failed \(KeyError: 'a'\)"):
        find_format("my_formats:question")({"q": "Hi"})


def test_the_identity_of_a_user_s_format_is_the_content_of_its_file(module):
    names = ("my_formats:question", "my_formats:swapped")
    before = list(map(format_identity, names))
    module.write_text(MODULE + "\n# changed\n")
    assert all(format_identity(name) != then for name, then in zip(names, before, strict=True))
    assert format_identity("openai") == "openai"


def test_modules_that_a_user_s_format_uses_belong_to_its_identity(module):
    """Also where a decorator of another module's would pass its own file for the format's."""
    helper = module.with_name("my_helper.py")
    helper.write_text("import functools\n\ndef noted(f):\n    return functools.wraps(f)(lambda *args: f(*args))\n")
    module.write_text("import json\nfrom my_helper import noted\n\n@noted\ndef decorated(record):\n    return record['a']\n")
    before = format_identity("my_formats:decorated")
    assert format_identity("my_formats:decorated") == before
    module.write_text(module.read_text() + "# changed\n")
    after = format_identity("my_formats:decorated")
    helper.write_text(helper.read_text() + "# changed\n")
    assert len({before, after, format_identity("my_formats:decorated")}) == 3


def test_a_package_is_known_by_the_module_that_its_format_comes_from(module):
    """Installed or not, and by a module beside it."""
    for place in (module.parent, module.parent / "site-packages"):
        package = place / "my_package"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("from my_package.inner import read\n")
        (package / "inner.py").write_text("from my_beside import clean\n\ndef read(record):\n    return clean(record)\n")
        (place / "my_beside.py").write_text("def clean(record):\n    return record['a']\n")
        sys.path.insert(0, str(place))
        before = format_identity("my_package:read")
        (package / "inner.py").write_text((package / "inner.py").read_text() + "# changed\n")
        changed = format_identity("my_package:read")
        (place / "my_beside.py").write_text("# changed\n")
        assert changed != before
        assert (format_identity("my_package:read") != changed) == (place == module.parent)  # the environment's otherwise
        for name in ("my_package", "my_package.inner", "my_beside"):
            del sys.modules[name]


@pytest.mark.parametrize("value", [float("nan"), [1, float("-inf")]])
def test_what_is_no_json_is_not_learnt(value):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": value}}}]}
    with pytest.raises(ValueError, match="message 2: arguments of tool call f hold NaN or Infinity"):
        parse_openai([USER, call])
    with pytest.raises(ValueError, match="tools hold NaN or Infinity"):
        parse_openai({"messages": [USER, ANSWER], "tools": [{"name": "f", "default": value}]})


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere.at_all:f", "ModuleNotFoundError"), ("my_formats:missing", "AttributeError"), ("my_formats:number", "is not a function")],
)
def test_a_format_that_cannot_be_imported_is_refused(module, name, words):
    with pytest.raises(ConfigError, match=rf"data\.format={name}: .*{words}"):
        find_format(name)


@settings(deadline=None)
@given(JSON)
@pytest.mark.parametrize("name", FORMATS)
def test_any_json_is_read_or_refused_with_a_value_error(name, record):
    with suppress(ValueError):
        assert isinstance(FORMATS[name](record), Conversation | Text)
