"""The tokenizer of a real model, on all the chats that ship."""

import json

import pytest
from hf_tokenizers import EXAMPLES
from transformers import AutoTokenizer

from xtuner_hydra.data.formats import parse_openai, parse_text
from xtuner_hydra.data.hf_tokenizer import HFTokenizer


@pytest.fixture(scope="module")
def ours(smollm2):
    return HFTokenizer(smollm2, "smollm2")


RECORDS = [json.loads(line) for line in (EXAMPLES / "openai_sft.jsonl").read_text(encoding="utf-8").splitlines()]


def test_ids_are_transformers_own_and_supervised_are_the_answers(smollm2, ours):
    theirs = AutoTokenizer.from_pretrained(smollm2)
    chats = [record for record in RECORDS if isinstance(record, list)]
    for record, (ids, supervised) in zip(chats, ours.encode_batch([parse_openai(record) for record in chats]), strict=True):
        assert ids.tolist() == theirs.apply_chat_template(record, return_dict=True).input_ids
        answers = [message["content"] + "<|im_end|>" for message in record if message["role"] == "assistant"]
        assert ours.decode(ids[supervised].tolist()) == "".join(answers)


def test_tool_calls_are_learnt_though_its_template_has_no_place_for_them(ours):
    for record in (record for record in RECORDS if isinstance(record, dict)):
        ids, supervised = ours.encode(parse_openai(record))
        learnt = ours.decode(ids[supervised].tolist())
        for message in record["messages"]:
            for call in message.get("tool_calls") or []:
                assert f'<tool_call>\n{{"name": "{call["function"]["name"]}"' in learnt


def test_a_text_ends_with_its_eos(smollm2, ours):
    ids, _ = ours.encode(parse_text({"text": "Hello there."}))
    assert ids.tolist() == [*AutoTokenizer.from_pretrained(smollm2)("Hello there.").input_ids, ours.eos_token_id]
    assert [ours.decode([number]) for number in ours.stop_token_ids] == ["<|im_end|>"]
