"""The data that ships: as much of it, and as varied, as the README says."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

import xtuner_hydra
from xtuner_hydra.data.formats import parse_openai
from xtuner_hydra.data.tokenizers import ByteTokenizer

EXAMPLES = Path(xtuner_hydra.__file__).parent / "examples"


def read(name):
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


TRAIN, HELD_OUT = read("openai_sft.jsonl"), read("openai_sft_heldout.jsonl")


def messages(record):
    return record["messages"] if isinstance(record, dict) else record


def chinese(record):
    return bool(re.search(r"[一-鿿]", json.dumps(record, ensure_ascii=False)))


def single_turn(record):
    return sum(message["role"] == "user" for message in messages(record)) == 1 and not isinstance(record, dict)


def test_128_to_train_on_and_32_held_out_all_readable():
    assert (len(TRAIN), len(HELD_OUT)) == (128, 32)
    for record in TRAIN + HELD_OUT:
        assert messages(record)[-1]["role"] == "assistant"
        assert ByteTokenizer().encode(parse_openai(record))[1].any()


def test_most_are_single_turn_english_with_answers_of_20_to_1500_bytes():
    answers = [messages(record)[-1]["content"] for record in TRAIN if single_turn(record) and not chinese(record)]
    assert len(answers) >= 90
    assert all(20 <= len(answer.encode()) <= 1500 for answer in answers)


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        pytest.param(lambda record: not single_turn(record) and not isinstance(record, dict), 10, id="several turns"),
        pytest.param(lambda record: messages(record)[0]["role"] == "system", 3, id="system message"),
        pytest.param(chinese, 5, id="Chinese"),
        pytest.param(lambda record: isinstance(record, dict) and "tools" in record, 3, id="tools"),
    ],
)
def test_the_other_kinds_are_there(kind, least):
    assert sum(map(kind, TRAIN)) >= least


def test_no_phrase_of_eight_words_is_in_more_than_three_samples():
    samples_with = defaultdict(set)
    for number, record in enumerate(TRAIN):
        for message in messages(record):
            words = re.findall(r"\w+", (message.get("content") or "").lower())
            for start in range(len(words) - 7):
                samples_with[tuple(words[start : start + 8])].add(number)
    assert max(map(len, samples_with.values())) <= 3


def test_no_held_out_prompt_is_trained_on():
    def prompts(records):
        return {message["content"].strip().lower() for record in records for message in messages(record) if message["role"] == "user"}

    assert not prompts(TRAIN) & prompts(HELD_OUT)


TEXTS = [record["text"] for record in read("pretrain_text.jsonl")]


def test_a_corpus_of_60_to_150_kilobytes_of_different_texts():
    assert 60_000 <= (EXAMPLES / "pretrain_text.jsonl").stat().st_size <= 150_000
    assert len(set(TEXTS)) == len(TEXTS) >= 100


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        pytest.param(lambda text: "|" in text and "---" in text, 5, id="tables"),
        pytest.param(
            lambda text: re.search(r"^(def|class|fn|import|#include|module|export|/\*\*|CREATE) ?", text, re.MULTILINE), 6, id="code"
        ),
        pytest.param(lambda text: text.count(". ") >= 4 and "|" not in text, 25, id="prose"),
        pytest.param(lambda text: bool(re.search(r"[一-鿿]", text)), 2, id="Chinese"),
    ],
)
def test_the_corpus_is_varied(kind, least):
    assert sum(bool(kind(text)) for text in TEXTS) >= least
