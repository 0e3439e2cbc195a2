"""`data` shows what a run learns from: the very tokens, what was lost and why."""

import json
import re

import numpy as np
import pytest
from chats import cache_of, chat, write_lines

from xtuner_hydra.__main__ import main
from xtuner_hydra.data.show import marked, pieces
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.tools.data import histogram


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """`data` inside this process: (exit code, what it prints)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))

    def run(*arguments):
        code = main(["data", "debug=fast", *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def lines(tmp_path):
    records = [chat("x" * 5), chat("a\nb", "why?"), chat("z" * 400), [chat("")[0], {**chat("n")[1], "loss": False}], b"{broken"]
    return write_lines(tmp_path / "chats.jsonl", records)


OURS = ("data=openai", "data.path=chats.jsonl", "data.bad_lines=skip")


def test_samples_have_what_is_learnt_in_brackets_when_piped(say, lines):
    code, text = say(*OURS)
    assert code == 0
    assert "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n⟦a\nb<|im_end|>⟧\n" in text
    assert "chats.jsonl line 2: 28 tokens, 4 supervised" in text
    assert "\x1b" not in text


def test_and_in_colour_on_a_terminal(say, lines, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, text = say(*OURS)
    assert "<|im_start|>assistant\n\x1b[32ma\nb<|im_end|>\x1b[0m\n" in text
    assert "⟦" not in text


@pytest.mark.parametrize(("option", "count"), [((), 3), (("-n", "1"), 1), (("-n2",), 2), (("-n", "0"), 0)])
def test_as_many_samples_as_asked_for(say, lines, option, count):
    _, text = say(*OURS, *option)
    assert len(re.findall(r"^--- ", text, re.MULTILINE)) == count


def test_what_was_cut_left_out_or_skipped_is_told_with_its_place(say, lines):
    _, text = say(*OURS)
    assert "1 cut to the longest that is allowed" in text
    assert re.search(r"cut to .*\n  \S*chats\.jsonl line 3: 4\d\d tokens", text)
    assert "1 left out: no supervised token" in text
    assert re.search(r"left out: .*\n  \S*chats\.jsonl line 4: ", text)
    assert "1 line skipped (1 JSON)" in text
    _, text = say(*OURS, "data.overlong=drop")
    assert re.search(r"1 dropped as longer than allowed .*\n  \S*chats\.jsonl line 3: ", text)


def test_lengths_and_packs_add_up(say, lines):
    _, text = say(*OURS)
    bars = [int(count) for count in re.findall(r"^ +\d+ to \d+ +(\d+)  #* *$", text, re.MULTILINE)]
    assert sum(bars) == 3
    assert re.search(r"packs of the first epoch: 2 of up to 256 tokens \(best_fit\)", text)


def test_each_source_of_a_mixture_is_shown(say, lines, tmp_path):
    write_lines(tmp_path / "texts.jsonl", [{"text": "hello there"}])
    _, text = say("data=openai", "data.sources=[{path: chats.jsonl},{path: texts.jsonl,format: text}]", "data.bad_lines=skip", "-n1")
    assert f"--- {tmp_path}/chats.jsonl line 1" in text
    assert f"--- {tmp_path}/texts.jsonl line 1: 12 tokens, 11 supervised\nh⟦ello there<|im_end|>⟧" in text


@pytest.mark.parametrize(
    ("arguments", "words"), [(("-m",), "without -m"), (("-n", "-1"), "0 or more"), (("data.path=nowhere",), "no such file")]
)
def test_it_refuses_what_the_run_would_refuse(say, arguments, words):
    code, text = say(*arguments)
    assert code == 2
    assert words in text


def test_a_file_cannot_steer_the_terminal(tmp_path):
    cache = cache_of(tmp_path, [chat("\x1b[2Jé\r")])
    shown = marked(pieces(ByteTokenizer(), cache.ids(0), cache.supervised(0)), colours=False)
    assert "⟦\\x1b[2Jé\\r<|im_end|>⟧" in shown


def test_a_histogram_holds_every_length_once():
    rng = np.random.default_rng(3)
    for top in (1, 2, 11, 12, 13, 500):
        lengths = rng.integers(1, top + 1, 50)
        counts = [int(re.search(r"to \d+ +(\d+)", line)[1]) for line in histogram(lengths)[:-1]]
        assert sum(counts) == 50
        assert f"longest {lengths.max()}" in histogram(lengths)[-1]


def test_the_first_sample_is_in_the_log_of_a_run(cli):
    done = cli("debug=fast", "tracking=none", "checkpoint=none", "data.eval_path=null", "hydra.run.dir=run")
    (line,) = [line for line in done.out.splitlines() if "first sample" in line]
    assert "⟦A handful of mansions" in line
    assert len(line) < 400
    assert json.loads((cli.directory / "run" / "status.json").read_text())["state"] == "completed"
