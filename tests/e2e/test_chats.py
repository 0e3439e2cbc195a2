"""Runs with a Hugging Face tokenizer, a mixture and a share held out, from the command line to what they export."""

import gzip
import json
from types import SimpleNamespace

import hf_tokenizers as made
import pytest
from chats import chat, write_lines
from conftest import CommandLine, read_rows
from transformers import AutoTokenizer, GenerationConfig

THOUGHTS = {"role": "assistant", "content": "b", "reasoning_content": "because"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two steps on chats, a text and a custom format, tokenised by a Qwen3-like tokenizer."""
    cli = CommandLine(tmp_path_factory.mktemp("chats"))
    directory = cli.directory
    made.chatml(directory / "tokenizer", template=made.QWEN3)
    write_lines(directory / "chats.jsonl", [[chat("")[0], {**THOUGHTS, "content": "b" * n}, *chat("c")] for n in range(1, 30)])
    (directory / "text.jsonl.gz").write_bytes(gzip.compress(b'{"text": "A short text."}\n' * 5))
    write_lines(directory / "pairs.jsonl", [{"q": f"question {n}", "a": "answer"} for n in range(5)])
    (directory / "mine.py").write_text(
        "def pair(record):\n    return [{'role': 'user', 'content': record['q']}, {'role': 'assistant', 'content': record['a']}]\n"
    )
    sources = "[{path: chats.jsonl}, {path: text.jsonl.gz, format: text, sample_ratio: 2}, {path: pairs.jsonl, format: 'mine:pair'}]"
    overrides = ["debug=fast", "data=openai", f"data.sources={sources}", "data.eval_ratio=0.2", "model.tokenizer=tokenizer"]
    options = ["model.vocab_size=2000", "tracking.wandb.enabled=false", "checkpoint.interval=1", "hydra.run.dir=run"]
    done = cli(*overrides, *options)
    assert done.code == 0, done.text
    return SimpleNamespace(cli=cli, done=done, run=directory / "run", overrides=overrides, options=options)


def test_the_log_says_which_template_which_sources_and_shows_a_sample(job):
    for words in (
        "qwen3 (ours, for training",
        "source 0: ",
        "source 2: ",
        "eval_ratio 0.2",
        "first sample",
        "<think>\\nbecause\\n</think>",
    ):
        assert words in job.done.out


def test_the_counts_of_each_source_are_kept(job):
    train = json.loads((job.run / "data.json").read_text())["train"]
    assert [source["samples"] for source in train["sources"]] == [29, 5, 5]
    assert sum(source["selected"]["samples"] for source in train["sources"]) == train["selected"]["samples"]


def test_the_held_out_share_is_evaluated(job):
    assert [row["eval/tokens"] > 0 for row in read_rows(job.run) if "eval/loss" in row] == [True]


def test_the_export_has_the_tokenizer_its_own_template_and_both_ends(job):
    exported, original = (
        AutoTokenizer.from_pretrained(job.run / "hf" / "latest"),
        AutoTokenizer.from_pretrained(job.cli.directory / "tokenizer"),
    )
    assert exported.chat_template == original.chat_template == made.QWEN3
    ends = GenerationConfig.from_pretrained(job.run / "hf" / "latest").eos_token_id
    assert exported.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def test_the_export_is_a_tokenizer_for_the_next_run(job):
    done = job.cli("plan", *job.overrides[:4], f"model.tokenizer={job.run / 'hf' / 'latest'}", "model.vocab_size=2000")
    assert "qwen3 (ours, for training" in done.out


def test_resuming_finds_the_same_data(job):
    done = job.cli(*job.overrides, *job.options, "checkpoint.resume=auto", "trainer.total_steps=2")
    assert (done.code, "nothing to do" in done.out) == (0, True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.tokenizer=tokenizer"], "take the tokenizer that belongs to the weights, or with random weights set model.vocab_size=903"),
        (["model.tokenizer=nowhere/at/all"], "model.tokenizer=nowhere/at/all: there is no such directory"),
        (["model.tokenizer=tokenizer", "model.chat_template=llama9"], "model.chat_template=llama9: there is no such file"),
        (["data.format=mine:nothing"], "data.format=mine:nothing: cannot be imported"),
        (["data.path=text.jsonl.gz"], "text.jsonl.gz line 1: an object needs `messages`"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(job, overrides, words):
    done = job.cli("debug=fast", "hydra.run.dir=refused", *overrides)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.text
    assert not (job.cli.directory / "refused").exists()
