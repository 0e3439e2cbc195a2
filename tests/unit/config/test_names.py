"""Names of runs and jobs are short, safe in a path, and need no quoting when typed as an override's value."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from xtuner_hydra.config.names import MAX_LENGTH, as_typed, job_name, run_name, split_override


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_override_is_its_key_and_its_value(prefix):
    assert split_override(f"{prefix}data.path=a=b") == ("data.path", "a=b")


def test_name_says_what_was_chosen():
    choices = {"model": "qwen3_tiny", "data": "openai_sft", "experiment": None, "scheduler": "linear", "debug": "fast"}
    overrides = ["model=qwen3_tiny", "scheduler=linear", "optimizer.lr=1e-4", "hydra.run.dir=/x", "data.path=/a/b.jsonl", "debug=fast"]
    assert run_name(choices, overrides) == "qwen3_tiny-openai_sft-fast-linear-lr1e-4"


def test_job_name_has_number_and_swept_values():
    assert job_name(3, ["optimizer.lr=6e-05", "data.pack_strategy=soft"]) == "3_lr6e-05-pack_strategy_soft"
    assert job_name(0, []) == "0"
    assert job_name(1, ["scheduler=linear", "data.path=/a/b/chats.jsonl"]) == "1_scheduler_linear-path_chats.jsonl"


@given(st.lists(st.text(max_size=300), max_size=20))
def test_any_override_gives_a_safe_path_component(values):
    name = job_name(1, [f"data.path={value}" for value in values])
    assert 0 < len(name) <= MAX_LENGTH
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_a_run_that_repeats_another_goes_by_its_name():
    choices = {"rerun": "mine", "experiment": "x", "model": "qwen3_tiny", "data": "openai", "optimizer": "adamw"}
    assert run_name(choices, []) == "mine"
    assert run_name(choices, ["optimizer=adamw", "model=qwen3_tiny", "optimizer.lr=1e-4"]) == "mine-qwen3_tiny-adamw-lr1e-4"


@pytest.mark.parametrize("path", ["/plain/step-1", "/with a space", "/a,b", "/it's", "/x=1", "/$HOME", "/größe (2)"])
def test_a_printed_override_is_the_path_again_after_shell_and_hydra(path):
    (word,) = shlex.split(as_typed("sweep.resume", Path(path)))
    override = OverridesParser.create().parse_override(word)
    assert str(override.value()) == path
