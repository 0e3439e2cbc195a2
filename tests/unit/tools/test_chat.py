"""chat: text in whole characters, the loop, and what it refuses."""

import builtins

import pytest

from xtuner_hydra.data.formats import Message
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import RefusedError
from xtuner_hydra.tools import chat


@pytest.mark.parametrize("text", ["", "plain", "naïve – 日本語 🐍!"])
def test_pieces_are_whole_characters_and_nothing_is_lost(text):
    pieces = list(chat.in_pieces(list(text.encode()), ByteTokenizer().decode))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)  # a character as soon as it is whole


def test_what_never_becomes_a_character_is_shown_at_the_end():
    assert "".join(chat.in_pieces([72, 0xE2, 0x82], ByteTokenizer().decode)) == "H\ufffd"


class Echo:
    """A speaker that says how much it has heard; `!` is interrupted after its first word, `?` is too much for it."""

    def __init__(self):
        self.heard = []

    def answer(self, messages):
        self.heard.append([(message.role, message.content) for message in messages])
        if messages[-1].content == "?":
            raise RefusedError("chat: too long")
        yield "one "
        if messages[-1].content == "!":
            raise KeyboardInterrupt
        yield str(len(messages))


def talk(monkeypatch, *lines, opening=()):
    """A chat in which `lines` are typed; an exception among them is what typing ended in."""
    lines = iter([*lines, EOFError()])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", typed)
    speaker = Echo()
    chat.talk(speaker, list(opening))
    return speaker.heard


def test_the_conversation_grows_until_the_input_ends(monkeypatch, capsys):
    heard = talk(monkeypatch, "a", "  ", "b", opening=[Message("system", "be brief", False)])
    assert heard[1] == [("system", "be brief"), ("user", "a"), ("assistant", "one 2"), ("user", "b")]
    assert len(heard) == 2
    assert capsys.readouterr().out == "one 2\none 4\n\n"


def test_ctrl_c_ends_an_answer_or_a_line_but_not_the_chat(monkeypatch):
    heard = talk(monkeypatch, "!", KeyboardInterrupt(), "b")
    assert heard[-1] == [("user", "!"), ("assistant", "one "), ("user", "b")]


def test_a_conversation_that_is_too_long_starts_anew(monkeypatch, capsys):
    assert talk(monkeypatch, "a", "?", "b")[-1] == [("user", "b")]
    assert "too long; the conversation starts anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature -1.0: must be 0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "1", "--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--top-p", "0.9"], "set --temperature too"),
        (["--seed", "1"], "set --temperature too"),
        (["--temperature", "1", "--seed", "-1"], "--seed -1: must be a whole number from 0"),
        (["--temperature", "1", "--seed", str(2**63)], "must be a whole number from 0 to 2"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_loaded(words, message):
    with pytest.raises(RefusedError, match=message):
        chat.main(["nowhere", *words])


def test_a_sweep_is_told_from_a_run(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RefusedError, match="a sweep, not a run"):
        chat.main([str(tmp_path), "-p", "x"])


def test_under_torchrun_it_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(RefusedError, match="start it without torchrun"):
        chat.main(["nowhere"])
