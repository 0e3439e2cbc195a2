"""Ids are transformers' own, and supervised is what the assistant must produce, to the character."""

import json
import pickle
from contextlib import suppress
from itertools import pairwise

import hf_tokenizers as made
import numpy as np
import pytest
from chats import chat, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.data import tokenising
from xtuner_hydra.data.cache import build_cache
from xtuner_hydra.data.formats import Conversation, Text, parse_openai, parse_text
from xtuner_hydra.data.hf_tokenizer import HFTokenizer
from xtuner_hydra.data.template_choice import FAMILIES
from xtuner_hydra.data.tokenizers import ByteTokenizer, load_tokenizer
from xtuner_hydra.errors import ConfigError

MAKERS = {
    "chatml": (made.chatml, {}),
    "marked": (made.chatml, {"template": made.CHATML_MARKED}),
    "llama3": (made.llama3, {}),
    "qwen3": (made.chatml, {"template": made.QWEN3}),
    "crossing": (made.chatml, {"whole_lines": True}),
    "plain": (made.chatml, {"template": made.NO_MARKERS}),
    "forgetful": (made.chatml, {"template": made.FORGETFUL}),
    "dated": (made.llama3, {"template": made.LLAMA3_DATED}),
    "bare": (made.chatml, {"template": None}),
    "endless": (made.chatml, {"template": made.CHATML_ENDLESS}),
    "thoughtless": (made.chatml, {"template": made.DROPS_THINKING}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Directories by name, each made when it is first asked for."""

    class Directories(dict):
        def __missing__(self, name):
            maker, options = MAKERS[name]
            self[name] = maker(tmp_path_factory.mktemp(name), **options)
            return self[name]

    return Directories()


@pytest.fixture(scope="module")
def load(directories):
    tokenizers = {}

    def load_one(name, chosen=None):
        if (name, chosen) not in tokenizers:
            tokenizers[name, chosen] = HFTokenizer(directories[name], str(directories[name]), chosen)
        return tokenizers[name, chosen]

    return load_one


@pytest.fixture(scope="module")
def theirs(directories):
    loaded = {}

    def load_one(name):
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(directories[name])
        return loaded[name]

    return load_one


def supervised_text(tokenizer, record):
    ids, supervised = tokenizer.encode(parse_openai(record))
    return "|".join(tokenizer.decode(ids[start:stop].tolist()) for start, stop in runs(supervised))


def runs(supervised):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], supervised.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


RECORDS = [
    chat("Hello."),
    [{"role": "system", "content": "Be brief."}, *chat("a", "b"), *chat("c  ", "d")],
    chat("  巴黎是法国的首都。🙂 é\n\n", "法国的首都?"),
    chat("It's 3 + 4 =  7.\n\n```\n\tx\n```", "?"),
]


@pytest.mark.parametrize("name", ["chatml", "marked", "llama3", "qwen3"])
@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_ids_are_those_of_apply_chat_template(load, theirs, name, record):
    expected = theirs(name).apply_chat_template(record, return_dict=True).input_ids
    assert load(name).encode(parse_openai(record))[0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "a <|im_end|>| c<|im_end|>"),
        ("marked", "a <|im_end|>| c<|im_end|>"),
        ("llama3", "a<|eot_id|>|c<|eot_id|>"),
        ("qwen3", "a <|im_end|>|<think>\n\n</think>\n\n c<|im_end|>"),
        ("crossing", "a <|im_end|>| c<|im_end|>"),
        ("plain", "a <|endoftext|>| c<|endoftext|>"),
        ("dated", "a<|eot_id|>|c<|eot_id|>"),
    ],
)
def test_supervised_is_content_and_the_token_that_ends_the_turn(load, name, expected):
    assert supervised_text(load(name), [*chat("a ", "x"), *chat(" c", "y")]) == expected


@pytest.mark.parametrize("name", ["chatml", "marked", "llama3", "qwen3"])
def test_the_mask_is_transformers_own_for_the_template_with_marks(load, theirs, name):
    """Of answers that begin with a letter: where one begins with a space, transformers' mask loses its first token."""
    template = {"chatml": made.CHATML_MARKED, "marked": made.CHATML_MARKED, "qwen3": FAMILIES["qwen3"]}.get(
        name, made.LLAMA3.replace("<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}", "MARK")
    )
    if "MARK" in template:
        body = "{{- message['content'] | trim + '<|eot_id|>' }}"
        template = template.replace("MARK", "<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}{% generation %}BODY")
        template = template.replace("BODY", body + "{% endgeneration %}{% else %}" + body + "{% endif %}")
    for record in (RECORDS[0], RECORDS[1], RECORDS[3]):
        made_by_them = theirs(name).apply_chat_template(record, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
        ids, supervised = load(name).encode(parse_openai(record))
        assert made_by_them["input_ids"] == ids.tolist()
        assert made_by_them["assistant_masks"] == supervised.astype(int).tolist()


WHOLE = [  # texts whose tokens would run across the beginning of the answer
    "\n\nHello",
    "\nassistant\n",
    " ",
    "\n",
]


@pytest.mark.parametrize("name", ["chatml", "marked", "crossing", "plain"])
@pytest.mark.parametrize("answer", WHOLE)
def test_a_token_never_runs_across_the_beginning_or_end_of_an_answer(load, theirs, name, answer):
    """What stands before an answer are the tokens that ask for it, also where one pass over the text would merge across."""
    record = [*chat(answer, "a"), *chat(answer + "x", " b ")]
    tokenizer = load(name)
    ids, supervised = tokenizer.encode(parse_openai(record))
    end = "<|endoftext|>" if name == "plain" else "<|im_end|>"
    assert supervised_text(tokenizer, record) == f"{answer}{end}|{answer}x{end}"
    whole = theirs(name).apply_chat_template(record, tokenize=False)
    assert tokenizer.decode(ids.tolist()) == whole
    for count, (start, _) in zip((1, 3), runs(supervised), strict=True):
        alone = theirs(name).apply_chat_template(record[:count], tokenize=False, add_generation_prompt=True)
        prefix = [] if count == 1 else ids[: runs(supervised)[0][1]].tolist()
        rest = alone.removeprefix(tokenizer.decode(prefix)) if prefix else alone
        assert ids[len(prefix) : start].tolist() == theirs(name)(rest, add_special_tokens=False).input_ids


def test_merges_do_cross_in_one_pass(theirs):
    """Or the test above would show nothing."""
    one = theirs("crossing").apply_chat_template(chat("\n\nHello", "a"), return_dict=True).input_ids
    alone = theirs("crossing").apply_chat_template(chat("", "a")[:1], add_generation_prompt=True, return_dict=True).input_ids
    assert one[: len(alone)] != alone


WORDS = st.text(st.sampled_from(list("ab \n\té🙂巴'.1")), max_size=8)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=3).filter(lambda turns: any(q + a for q, a, _ in turns)))
@pytest.mark.parametrize("name", ["chatml", "marked", "crossing"])
def test_any_chat_is_the_template_s_text_with_exactly_the_answers_supervised(load, name, turns):
    record = [message for q, a, loss in turns for message in (chat(a, q)[0], {**chat(a)[1], "loss": loss})]
    tokenizer = load(name)
    ids, supervised = tokenizer.encode(parse_openai(record))
    decode = tokenizer.decode
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in record)
    assert decode(ids.tolist()) == text
    learnt = [message["content"] + "<|im_end|>" for message in record if message.get("loss")]
    assert [decode(ids[start:stop].tolist()) for start, stop in runs(supervised)] == learnt


@pytest.mark.parametrize("name", ["chatml", "marked", "llama3", "qwen3"])
def test_loss_false_takes_the_whole_turn_out(load, name):
    record = [*chat("one"), chat("")[0], {**chat("two")[1], "loss": False}, *chat("three")]
    text = supervised_text(load(name), record)
    assert "two" not in text
    assert text.startswith("one<|")
    assert "three" in text


@pytest.mark.parametrize("question", ["why", "u", "user", "e\n"])  # some are in the header of the turn too
def test_loss_true_on_a_question_takes_its_content_in(load, question):
    record = [{"role": "user", "content": question, "loss": True}, chat("so")[1]]
    for name in ("chatml", "qwen3"):
        first, second = supervised_text(load(name), record).split("<|im_end|>|")
        assert (first, second.rpartition("</think>")[2].strip()) == (question, "so<|im_end|>")


CALLS = {
    "messages": [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "add\n",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "done"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds <a> & é"}}],
}


def test_a_template_gets_the_ids_of_calls(load, tmp_path):
    """Mistral's refuses a chat without them."""
    call = "'[' ~ call.id ~ call.function.name ~ call.function.arguments | tojson ~ ']'"
    calls = "{% for call in message.tool_calls or [] %}{{ " + call + " }}{% endfor %}"
    (tmp_path / "ids.jinja").write_text(made.CHATML.replace("+ '<|im_end|>' +", "}}" + calls + "{{ '<|im_end|>' +"))
    made_call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    record = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [made_call]}]
    assert supervised_text(load("chatml", str(tmp_path / "ids.jinja")), record) == "[abcdefghiadd{}]<|im_end|>"


@pytest.mark.parametrize(("name", "expected"), [("chatml", "hello<|im_end|>|c<|im_end|>"), ("llama3", "hello<|eot_id|>|c<|eot_id|>")])
def test_a_greeting_before_the_first_question_is_learnt_without_its_header(load, name, expected):
    record = [{"role": "assistant", "content": "hello"}, *chat("c", "b")]
    assert supervised_text(load(name), record) == expected


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_thinking_and_tool_calls_are_supervised(load):
    expected = f"<think>\nadd\n</think>\n\n{CALL}<|im_end|>|<think>\ndone\n</think>\n\nIt is 2.<|im_end|>"
    assert supervised_text(load("qwen3"), CALLS) == expected


def test_what_a_template_has_no_place_for_is_written_into_the_text_and_announced(load):
    tokenizer = load("chatml")
    assert "has no place for tools and thinking" in tokenizer.name
    assert (
        supervised_text(tokenizer, CALLS) == f"<think>\nadd\n\n</think>\n\n{CALL}<|im_end|>|<think>\ndone\n</think>\n\nIt is 2.<|im_end|>"
    )
    ids, _ = tokenizer.encode(parse_openai(CALLS))
    assert "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>" in tokenizer.decode(ids.tolist())


@pytest.mark.parametrize(("name", "role"), [("chatml", "developer"), ("qwen3", "system")])
def test_a_developer_s_message_is_the_system_s_where_the_template_would_pass_over_it(load, name, role):
    ids, _ = load(name).encode(parse_openai([{"role": "developer", "content": "Be brief."}, *chat("a")]))
    assert load(name).decode(ids.tolist()).startswith(f"<|im_start|>{role}\nBe brief.<|im_end|>\n")


THINKING = st.none() | st.sampled_from(["", "t", "\nt\n\nu\n"])
CONTENT = st.sampled_from(["", "a", "\n b ", "<think>\nx\n</think>\n\ny", "</think>z", "<tool_response>r</tool_response>"])
ASSISTANT = st.builds(
    lambda content, thinking, calls: {
        "role": "assistant",
        "content": content,
        **({} if thinking is None else {"reasoning_content": thinking}),
        **({"tool_calls": calls} if calls else {}),
    },
    CONTENT,
    THINKING,
    st.lists(st.just({"type": "function", "function": {"name": "f", "arguments": {"x": "é<"}}}), max_size=2),
)
OTHERS = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user", "tool"]), CONTENT)


def kept(messages):
    """Whether the original keeps all thinking: none stands before the last question."""
    queries = [i for i, one in enumerate(messages) if one["role"] == "user" and not one["content"].startswith("<tool_response>")]
    last = queries[-1] if queries else len(messages) - 1
    return not any(message.get("reasoning_content") or "</think>" in message["content"] for message in messages[: last + 1])


@settings(deadline=None, max_examples=300)
@given(st.lists(ASSISTANT | OTHERS, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_our_qwen3_template_renders_the_same_bytes_wherever_the_original_keeps_everything(theirs, messages, with_tools, ask):
    options = {"tools": CALLS["tools"] if with_tools else None, "tokenize": False, "add_generation_prompt": ask}
    original = theirs("qwen3").apply_chat_template(messages, **options)
    ours = theirs("qwen3").apply_chat_template(messages, chat_template=FAMILIES["qwen3"], **options)
    assert (original == ours) or not kept(messages)


def test_our_qwen3_template_keeps_what_the_original_drops(load):
    record = [*chat("a")[:1], {**chat("a")[1], "reasoning_content": "t"}, *chat("b")[:1], {**chat("b")[1], "reasoning_content": "u"}]
    assert supervised_text(load("qwen3"), record) == "<think>\nt\n</think>\n\na<|im_end|>|<think>\nu\n</think>\n\nb<|im_end|>"


def test_the_qwen3_family_is_recognised_and_announced_and_may_be_named(load):
    assert "qwen3 (ours, for training" in load("qwen3").name
    assert "qwen3 (ours" in load("chatml", "qwen3").name
    assert "its own" in load("chatml").name


def test_a_template_that_forgets_is_refused_with_the_remedy_where_it_matters(load):
    with pytest.raises(ValueError, match=r"message 2: the chat template renders .* differently .* model\.chat_template=PATH"):
        load("forgetful").encode(parse_openai([*chat("a"), *chat("b")]))


def test_thinking_that_a_template_drops_is_refused(load):
    answer = {**chat("x")[1], "reasoning_content": "because"}
    with pytest.raises(ValueError, match=r"message 2: the chat template leaves out its thinking; .* model\.chat_template=PATH"):
        load("thoughtless").encode(parse_openai([chat("x")[0], answer]))
    assert supervised_text(load("thoughtless"), [chat("x")[0], {**answer, "loss": False}, *chat("y")]) == "y<|im_end|>"


@pytest.mark.parametrize("content", ["<think>because</think>x", "because\n</think>\n\nx"])
def test_thinking_within_an_answer_that_a_template_drops_is_refused(load, content):
    answer = {**chat("x")[1], "content": content}
    with pytest.raises(ValueError, match="message 2: the chat template leaves out its thinking"):
        load("thoughtless").encode(parse_openai([chat("x")[0], answer]))
    assert supervised_text(load("chatml"), [chat("x")[0], answer]) == f"{content}<|im_end|>"


WITH_CALLS = made.CHATML.replace(" + '<|im_end|>'", " + (message.tool_calls or '') | string + '<|im_end|>'")


@pytest.mark.parametrize(
    "template",
    [
        WITH_CALLS,  # a place for calls, none for tools
        made.CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"),
    ],
)
def test_tools_that_a_template_drops_are_refused(load, tmp_path, template):
    """With and without a call; a conversation without tools is fine, and so is a template that has them."""
    path = tmp_path / "toolless.jinja"
    path.write_text(template)
    tokenizer = load("chatml", str(path))
    for record in (CALLS, {"messages": chat("a"), "tools": CALLS["tools"]}):
        with pytest.raises(ValueError, match=r"leaves out the tools that the conversation has; .* model\.chat_template=PATH"):
            tokenizer.encode(parse_openai(record))
    assert supervised_text(tokenizer, chat("a")) == "a<|im_end|>"
    path.write_text("{{ tools | tojson if tools }}" + WITH_CALLS)
    assert supervised_text(load("bare", str(path)), {"messages": chat("a"), "tools": CALLS["tools"]}) == "a<|im_end|>"


def writing(answer):
    """A template that lists the tools, and writes messages as `answer` says."""
    return "{{ tools | tojson if tools }}" + made.CHATML.replace("message['content'] +", f"({answer}) +")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (writing("message.content or message.tool_calls | tojson"), "message 2: the chat template leaves out its tool calls"),
        (writing("message.tool_calls | tojson if message.tool_calls else message.content"), "leaves out its content"),
        (writing("message.content + (message.tool_calls[0] | tojson if message.tool_calls else '')"), "leaves out its tool calls"),
        ("{{ tools | tojson if tools }}{# tool_calls #}" + made.CHATML_MARKED, "leaves out its tool calls"),
    ],
)
def test_an_answer_that_a_template_drops_a_part_of_is_refused(load, tmp_path, template, words):
    """Though the tools' names stand in the list of tools, and a call beside the one that is lost."""
    path = tmp_path / "drops.jinja"
    path.write_text(template)
    calls = [{"function": {"name": "add", "arguments": {"a": number}}} for number in (1, 2)]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [chat("x")[0], {"role": "assistant", "content": "I add.", "tool_calls": calls}]
    with pytest.raises(ValueError, match=words):
        load("chatml", str(path)).encode(parse_openai({"messages": messages, "tools": tools}))
    assert supervised_text(load("chatml", str(path)), {"messages": chat("a"), "tools": tools}) == "a<|im_end|>"


def test_an_answer_that_a_template_drops_is_missed_where_the_question_has_its_words(load, tmp_path):
    path = tmp_path / "drops.jinja"
    path.write_text(writing("message.tool_calls | tojson if message.tool_calls else message.content"))
    call = {"role": "assistant", "content": "OK", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    question = {"role": "user", "content": "OK? Add."}
    with pytest.raises(ValueError, match="message 2: the chat template leaves out its content"):
        load("chatml", str(path)).encode(parse_openai({"messages": [question, call], "tools": CALLS["tools"]}))


def test_results_of_tools_that_a_template_drops_are_refused(load, tmp_path):
    """Or the model would learn to know what it has not read."""
    path = tmp_path / "drops.jinja"
    path.write_text(writing("message.content + (message.tool_calls | tojson if message.tool_calls else '')"))
    messages = [*CALLS["messages"][:2], {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "It is."}]
    tokenizer = load("chatml", str(path))
    tokenizer.encode(parse_openai({**CALLS, "messages": messages}))
    deaf = tmp_path / "deaf.jinja"
    deaf.write_text(path.read_text().replace("for message in messages", "for message in messages if message.role != 'tool'"))
    with pytest.raises(ValueError, match="leaves out the results of tools; give"):
        load("chatml", str(deaf)).encode(parse_openai({**CALLS, "messages": messages}))


@pytest.mark.parametrize("lost", ["system", "user"])
@pytest.mark.parametrize("template", [made.CHATML, made.CHATML_MARKED])
def test_a_question_or_instructions_that_a_template_drops_are_refused(load, tmp_path, template, lost):
    """Or the model would learn to answer what it has not been asked."""
    path = tmp_path / "drops.jinja"
    path.write_text(template.replace("{% for message in messages %}", f"{{% for message in messages if message.role != '{lost}' %}}"))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(
        ValueError, match=rf"message {1 if lost == 'system' else 2}: the chat template leaves out what the {lost} says; give"
    ):
        load("chatml", str(path)).encode(parse_openai(asked))
    kept = [message for message in asked if message["role"] != lost]
    assert supervised_text(load("chatml", str(path)), kept) == "a<|im_end|>"


@pytest.mark.parametrize("template", [made.CHATML, made.CHATML_MARKED])
def test_instructions_that_a_template_drops_are_missed_where_the_question_repeats_them(load, tmp_path, template):
    path = tmp_path / "drops.jinja"
    path.write_text(template.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"))
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Be brief. Who?"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(ValueError, match="message 1: the chat template leaves out what the system says; give"):
        load("chatml", str(path)).encode(parse_openai(asked))
    assert supervised_text(load("chatml"), asked) == "a<|im_end|>"
    assert supervised_text(load("chatml"), [asked[1], asked[2], asked[1], asked[2]]) == "a<|im_end|>|a<|im_end|>"


def test_a_template_that_ends_every_text_with_an_eos_is_learnt_from(load, tmp_path):
    """As Phi-3's: the text up to a turn has one too, the whole conversation only at its end."""
    path = tmp_path / "phi.jinja"
    path.write_text(made.CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"))
    tokenizer = load("chatml", str(path))
    text = supervised_text(tokenizer, [*chat("a"), *chat("b")])
    assert text.startswith("a<|im_end|>|b<|im_end|>")
    assert text.endswith(tokenizer.decode([tokenizer.eos_token_id]))


def test_a_header_that_a_prompt_lacks_is_announced_as_learnt(load, tmp_path):
    path = tmp_path / "unasked.jinja"
    path.write_text(made.CHATML.partition("{% if add_generation_prompt %}")[0])
    tokenizer = load("chatml", str(path))
    assert supervised_text(tokenizer, chat("a")) == "<|im_start|>assistant\na<|im_end|>"
    assert "does not end a prompt with '<|im_start|>assistant': it is learnt" in tokenizer.name
    assert "is learnt" not in load("chatml").name


def test_a_switch_for_thinking_in_the_prompt_is_no_place_for_it(load, tmp_path):
    path = tmp_path / "switch.jinja"
    path.write_text(made.CHATML_MARKED + "{% if enable_thinking is defined %}{% endif %}")
    tokenizer = load("chatml", str(path))
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "because"}
    assert supervised_text(tokenizer, [chat("x")[0], answer]) == "<think>\nbecause\n</think>\n\nyes<|im_end|>"


def test_a_template_that_fails_and_one_that_speaks_of_marks_in_a_comment(load, tmp_path):
    (tmp_path / "fails.jinja").write_text(made.CHATML + "{{ '' if 1 / (messages | length - 3) }}")
    tokenizer = load("chatml", str(tmp_path / "fails.jinja"))
    assert supervised_text(tokenizer, chat("a")) == "a<|im_end|>"
    with pytest.raises(ValueError, match=r"fails on this conversation \(ZeroDivisionError: division by zero\)"):
        tokenizer.encode(parse_openai([{"role": "system", "content": "s"}, *chat("a")]))
    (tmp_path / "speaks.jinja").write_text("{# {% generation %} #}" + made.CHATML)
    assert supervised_text(load("chatml", str(tmp_path / "speaks.jinja")), chat("a")) == "a<|im_end|>"


def test_marks_that_leave_out_the_end_of_the_turn_are_announced(load):
    assert "of which no token that ends a turn is learnt" in load("endless").name
    assert "no token that ends a turn" not in load("marked").name
    assert supervised_text(load("endless"), chat("a")) == "a"


def test_a_template_that_is_no_jinja_is_refused(load, tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("fine\n{% for %}")
    with pytest.raises(ConfigError, match=r"model\.chat_template=.*broken\.jinja: line 2 is not Jinja"):
        load("chatml", str(path))


def test_two_processes_make_the_cache_that_one_makes(load, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "CHUNK_BYTES", 2000)
    options = {"bad_lines": "skip", "progress": False}
    lines = [*RECORDS * 5, [{"role": "assistant", "content": "first"}], CALLS, b"{broken", *RECORDS]
    path = write_lines(tmp_path / "data.jsonl", lines)
    one = build_cache([path], "openai", load("qwen3"), cache_dir=tmp_path / "one", num_workers=0, **options)
    monkeypatch.setattr(tokenising, "SERIAL_BYTES", 0)
    two = build_cache([path], "openai", load("qwen3"), cache_dir=tmp_path / "two", num_workers=2, **options)
    assert [two.ids(i).tolist() for i in range(len(two))] == [one.ids(i).tolist() for i in range(len(one))]
    assert [two.supervised(i).tolist() for i in range(len(two))] == [one.supervised(i).tolist() for i in range(len(one))]
    assert two.skipped == one.skipped
    assert [line.kind for line in one.skipped] == ["JSON"]


def test_a_template_of_the_user_s(load, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(made.CHATML_MARKED)
    tokenizer = load("forgetful", str(path))
    assert supervised_text(tokenizer, [*chat("a"), *chat("b")]) == "a<|im_end|>|b<|im_end|>"
    assert str(path) in tokenizer.name
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == made.CHATML_MARKED


def test_a_template_of_the_user_s_is_the_only_one_in_an_export(tmp_path):
    """transformers would take the tokenizer's own for conversations with tools."""
    made.chatml(tmp_path / "old")
    more = tmp_path / "old" / "additional_chat_templates" / "tool_use.jinja"
    more.parent.mkdir()
    more.write_text("theirs")
    (tmp_path / "mine.jinja").write_text(made.CHATML_MARKED)
    for chosen in (None, str(tmp_path / "mine.jinja")):
        to = tmp_path / str(bool(chosen))
        to.mkdir()
        HFTokenizer(tmp_path / "old", "old", chosen).save(to)
        assert (to / "additional_chat_templates").exists() == (chosen is None)
    text = AutoTokenizer.from_pretrained(to).apply_chat_template(chat("a"), tools=CALLS["tools"], tokenize=False)
    assert text == AutoTokenizer.from_pretrained(to).apply_chat_template(chat("a"), tokenize=False)


def test_a_chat_without_a_template_is_refused_and_a_text_is_not(load):
    with pytest.raises(ValueError, match=r"no chat template; .* model\.chat_template=PATH"):
        load("bare").encode(parse_openai(chat("a")))
    assert load("bare").encode(parse_text("a b"))[1].all()


def test_the_date_in_a_template_is_always_the_same(load):
    ids, _ = load("dated").encode(parse_openai(chat("a")))
    assert load("dated").decode(ids.tolist()).startswith("<|begin_of_text|>26 Jul 2024<|start_header_id|>")


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_text_has_the_tokenizer_s_special_tokens_and_an_eos(load, theirs, name):
    text = " One line.\n\nAnother é 🙂  "
    ids, supervised = load(name).encode(parse_text({"text": text}))
    assert ids.tolist() == [*theirs(name)(text).input_ids, theirs(name).eos_token_id]
    before = 1 if name == "llama3" else 0
    assert supervised.tolist() == [False] * before + [True] * (len(ids) - before)


def test_prompt_and_completion_are_cut_between_them(load, theirs):
    tokenizer = load("crossing")
    for prompt, completion in pairwise(["Answer: ", " a", "\n\n", "word", "s \n"]):
        ids, supervised = tokenizer.encode(Text([(prompt, False), (completion, True)]))
        assert ids[~supervised].tolist() == theirs("crossing")(prompt).input_ids
        assert tokenizer.decode(ids[supervised].tolist()) == completion + "<|endoftext|>"


def test_a_prompt_is_tokenised_as_it_is_alone_also_where_no_token_runs_across_its_end(load, theirs):
    """Two spaces are one token, but before a word the second one goes with the word: here without being merged with it."""
    alone, whole = (theirs("chatml")(text).input_ids for text in ("a  ", "a  Ω"))
    assert whole[: len(alone)] != alone
    assert theirs("chatml").decode(whole[:3]) == "a  "
    ids, supervised = load("chatml").encode(Text([("a  ", False), ("Ω", True)]))
    assert ids[~supervised].tolist() == alone
    assert load("chatml").decode(ids.tolist()) == "a  Ω<|endoftext|>"


def test_a_missing_eos_is_a_sentence(tmp_path):
    made.save(tmp_path, made.byte_level(), made.CHATML)
    tokenizer = HFTokenizer(tmp_path, "here")
    assert tokenizer.eos_token_id is None
    assert supervised_text(tokenizer, chat("a")) == "a<|im_end|>"
    with pytest.raises(ValueError, match="no EOS token"):
        tokenizer.encode(parse_text("a"))


END = ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize(("name", "ends"), [("chatml", END), ("llama3", ["<|eot_id|>"]), ("qwen3", END)])
def test_generation_ends_at_the_end_of_a_turn_and_at_eos(load, name, ends):
    assert [load(name).decode([number]) for number in load(name).stop_token_ids] == ends


@pytest.mark.parametrize("name", ["chatml", "marked", "llama3", "qwen3", "byte"])
def test_the_prompt_is_what_stands_before_an_answer(load, name):
    tokenizer = ByteTokenizer() if name == "byte" else load(name)
    conversation = parse_openai(chat("Hello.", "Hi"))
    ids, supervised = tokenizer.encode(conversation)
    asked = tokenizer.prompt(Conversation(conversation.messages[:1]))
    assert asked.tolist() == ids[: supervised.argmax()].tolist()


def test_a_tokenizer_that_adds_spaces(tmp_path):
    """Llama-2's kind: a space is put before any text, so that it cannot be cut anywhere."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = HFTokenizer(made.sentencepiece_like(tmp_path, template), "here")
    record = [*chat("The water is cold.", "How is it?"), *chat("Warm.", "And now?")]
    ids, supervised = tokenizer.encode(parse_openai(record))
    assert ids.tolist() == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(record, return_dict=True).input_ids
    assert [tokenizer.decode(ids[start:stop].tolist()).strip() for start, stop in runs(supervised)] == [
        "The water is cold. </s>",
        "Warm. </s>",
    ]


@pytest.mark.parametrize("prepend", [None, "always", "first"])
def test_where_such_a_tokenizer_is_cut_it_adds_no_space(tmp_path, prepend):
    """The ids of each turn alone, special tokens included, are those of the whole; what cannot be so is refused."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + 'Q: ' + message['content'] + ' A:' }}"
        "{% else %}{{ message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    )
    made.sentencepiece_like(tmp_path, template)
    if prepend:  # the newer way of the same
        path = tmp_path / "tokenizer.json"
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend, "split": False}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None, "pre_tokenizer": space}))
    tokenizer = HFTokenizer(tmp_path, "here")
    whole = tokenizer._backend.encode("<s>Q: b A: a</s>\n<s>Q: d A:  c</s>\n", add_special_tokens=False).ids
    conversation = parse_openai([*chat(" a", "b"), *chat("  c", "d")])
    rendered = tokenizer.template.spans(conversation)
    ids, supervised = tokenizer._in_pieces(rendered)
    assert ids.tolist() == whole
    assert len(runs(supervised)) == 2
    for answer in ("a", "\na"):
        with pytest.raises(ValueError, match="cannot be cut there"):
            tokenizer._in_pieces(tokenizer.template.spans(parse_openai(chat(answer))))


def test_a_byte_level_tokenizer_that_adds_a_space_is_not_cut_before_a_word(tmp_path):
    """GPT-2's with add_prefix_space; ids of a piece that begins with a space are those of the whole."""
    tokenizer = made.byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.save(tmp_path, tokenizer, made.NO_MARKERS.replace("Answer: ", "Answer:"), eos_token="<|endoftext|>")
    ours = HFTokenizer(tmp_path, "here")
    rendered = ours.template.spans(parse_openai(chat(" Hello.")))
    assert ours._in_pieces(rendered)[0].tolist() == ours._backend.encode(rendered.text, add_special_tokens=False).ids
    with pytest.raises(ValueError, match="cannot be cut there"):
        ours._in_pieces(ours.template.spans(parse_openai(chat("Hello."))))


def test_processes_that_tokenise_get_all_they_need(load):
    for name in ("chatml", "qwen3"):
        copy = pickle.loads(pickle.dumps(load(name)))
        for ours, theirs in zip(copy.encode(parse_openai(CALLS)), load(name).encode(parse_openai(CALLS)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_fingerprint_is_of_content_and_template(directories, load, tmp_path):
    again = HFTokenizer(made.chatml(tmp_path), "elsewhere")
    assert again.fingerprint == load("chatml").fingerprint
    prints = [load(name).fingerprint for name in ("chatml", "marked", "llama3", "qwen3", "crossing", "bare")]
    assert len(set(prints)) == len(prints)
    assert load("chatml", "qwen3").fingerprint == load("qwen3").fingerprint  # recognised or named, it is the same template


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_an_export_has_the_same_files_and_the_original_template(directories, load, theirs, name, tmp_path):
    load(name).save(tmp_path)
    for path in directories[name].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == theirs(name).chat_template
    assert (
        again.apply_chat_template(RECORDS[1], return_dict=True).input_ids
        == theirs(name).apply_chat_template(RECORDS[1], return_dict=True).input_ids
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_ids_are_those_that_the_export_s_tokenizer_gives_whatever_the_family(tmp_path, family):
    """For qwen2 transformers takes a class of its own, which composes characters and splits digits, whatever tokenizer_config.json names."""
    directory, export = tmp_path / "source", tmp_path / "export"
    tokenizer = made.byte_level()
    tokenizer.normalizer = normalizers.NFD()
    made.save(directory, tokenizer, made.CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    used = load_tokenizer(model(tokenizer=str(directory), family=family))
    used.save(export)
    AutoConfig.for_model(family).save_pretrained(export)
    record = chat("caf\u00e9 cafe\u0301 12345", "e\u0301?")
    expected = AutoTokenizer.from_pretrained(export).apply_chat_template(record, return_dict=True).input_ids
    assert used.encode(parse_openai(record))[0].tolist() == expected


def test_a_template_of_ours_is_exported_where_there_is_no_original(load, tmp_path):
    load("bare", "qwen3").save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == FAMILIES["qwen3"]


def test_half_a_surrogate_pair_spoils_its_own_line_only(load):
    good, bad = parse_openai(chat("a")), parse_openai(json.loads(r'[{"role": "assistant", "content": "\ud800"}]'))
    results = load("marked").encode_batch([good, bad, good])
    assert [isinstance(result, ValueError) for result in results] == [False, True, False]


def model(**options):
    return ModelConfig(**{"vocab_size": 2000, **options})


def test_the_tokenizer_of_the_checkpoint_is_the_default(directories):
    named, default = model(tokenizer=str(directories["llama3"])), model(pretrained=str(directories["llama3"]))
    assert load_tokenizer(named).fingerprint == load_tokenizer(default).fingerprint
    assert load_tokenizer(model(pretrained=str(directories["llama3"]), tokenizer="byte")).fingerprint == ByteTokenizer().fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": "/nowhere/at/all"}, "model.tokenizer=/nowhere/at/all: there is no such directory"),
        (
            {"tokenizer": "chatml", "chat_template": "chatml"},
            "model.chat_template=chatml: there is no such file; give a .jinja file, or one of qwen3",
        ),
        ({"tokenizer": "empty"}, "there is no tokenizer in it"),
        ({"tokenizer": "broken"}, "transformers cannot load the tokenizer"),
    ],
)
def test_what_cannot_be_had_is_refused(directories, tmp_path, options, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    places = {"chatml": str(directories["chatml"]), "empty": str(tmp_path / "empty"), "broken": str(tmp_path / "broken")}
    with pytest.raises(ConfigError) as error:
        load_tokenizer(model(**options | {"tokenizer": places.get(options["tokenizer"], options["tokenizer"])}))
    assert words in str(error.value)


def test_a_tokenizer_without_places_is_refused(tmp_path):
    from transformers import CanineTokenizer

    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no fast implementation"):
        load_tokenizer(model(tokenizer=str(tmp_path)))


def test_code_in_a_tokenizer_s_directory_is_never_run(directories, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((directories["chatml"] / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with suppress(ConfigError):  # or loaded as one of transformers' own, without that code
        load_tokenizer(model(tokenizer=str(tmp_path)))
    assert not (tmp_path / "ran").exists()
