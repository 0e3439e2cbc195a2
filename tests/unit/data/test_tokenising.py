import json
import os

import numpy as np
import pytest
from chats import build, cache_of, chat, content, expected, write_lines

from xtuner_hydra.data import tokenising
from xtuner_hydra.data.bad_lines import LONGEST_MESSAGE
from xtuner_hydra.data.cache import build_cache
from xtuner_hydra.data.sources import LINE_BYTES
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import ConfigError, DataError

RECORDS = [chat("x" * n, f"question {n}") for n in range(1, 40)]


def test_many_chunks_by_two_processes_are_one_file_read_in_one_go(tmp_path, monkeypatch):
    records = [RECORDS[0], b"", b"{broken", *RECORDS[1:]]
    serial = cache_of(tmp_path, records, bad_lines="skip")
    monkeypatch.setattr(tokenising, "CHUNK_BYTES", 300)
    monkeypatch.setattr(tokenising, "SERIAL_BYTES", 0)
    (tmp_path / "elsewhere").mkdir()
    parallel = build(serial.files, tmp_path / "elsewhere", bad_lines="skip", num_workers=2)
    assert content(parallel) == content(serial)
    np.testing.assert_array_equal(parallel.lines, serial.lines)
    assert [line.line for line in parallel.skipped] == [line.line for line in serial.skipped] == [3]


def test_a_bad_line_in_a_late_chunk_of_a_second_file_has_its_own_number(tmp_path, monkeypatch):
    files = [write_lines(tmp_path / "good.jsonl", RECORDS), write_lines(tmp_path / "bad.jsonl", [*RECORDS, b"", b"{broken", *RECORDS])]
    monkeypatch.setattr(tokenising, "CHUNK_BYTES", 300)
    with pytest.raises(DataError, match=r"bad\.jsonl line 41: not valid JSON \(.* at column 2\)"):
        build(files, tmp_path)


class DyingTokenizer(ByteTokenizer):
    """Ends its process without a word, as the kernel does when memory runs out."""

    def encode(self, conversation):
        os._exit(9)


def test_a_process_that_dies_ends_in_an_error_not_in_waiting(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "data.jsonl", RECORDS)
    monkeypatch.setattr(tokenising, "CHUNK_BYTES", 300)
    monkeypatch.setattr(tokenising, "SERIAL_BYTES", 0)
    with pytest.raises(ConfigError, match=r"data\.num_workers=2: a process that tokenises died"):
        build_cache([path], "openai", DyingTokenizer(), bad_lines="error", cache_dir=tmp_path / "cache", num_workers=2, progress=False)
    assert list(tmp_path.iterdir()) == [path]


DEEP = [{**chat("")[1], "tool_calls": [{"name": "f", "arguments": "[" * 10**5}]}]  # JSON in a string


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        (b"{broken", "JSON", "not valid JSON"),
        (b"[1" + b"0" * 10_000 + b"]", "JSON", "not usable JSON"),
        (b'{"messages": 1, "messages": 2}', "JSON", "not usable JSON (the key 'messages' occurs twice in one object)"),
        (b'["\xff"]', "UTF-8", "byte 3 is 0xff"),
        (json.dumps([{"role": "robot", "content": ""}]).encode(), "conversation", "robot"),
        (rb'[{"role": "assistant", "content": "\ud800"}]', "conversation", "surrogate"),
        (rb'[{"role": "\ud800", "content": ""}]', "conversation", r"\ud800"),
        (b'["' + b"x" * 10**6 + b'"]', "conversation", "expected an object"),
        (b'{"' + b"x" * 10**6 + b'": 1}', "conversation", "xxx ..."),
        (b"[" * 100_000, "nesting", "nested too deeply"),
        (b'{"messages": ' * 5000 + b"1" + b"}" * 5000, "nesting", "nested too deeply"),
        (json.dumps(DEEP).encode(), "nesting", "nested too deeply"),
        (b"\0" * 100, "NUL bytes", "NUL bytes (100 of 100, the first at byte 1)"),
        (b"\xff\xfe[\0]\0", "NUL bytes", "(2 of 6, the first at byte 4)"),
        (json.dumps(chat("x")).encode() + b"\0", "NUL bytes", "(1 of "),
        (json.dumps(chat("a\0b")).encode(), "NUL bytes", "U+0000"),
        (json.dumps({"messages": chat("x"), "tools": [{"name": ["\0"]}]}).encode(), "NUL bytes", "U+0000"),
        (b"null", "empty", "nothing in it"),
        (b"{}", "empty", "nothing in it"),
        (b" [ ] ", "empty", "nothing in it"),
        (b'""', "empty", "nothing in it"),
        (b'{"messages": []}', "empty", "without a message"),
        (json.dumps(chat("", "")).encode(), "empty", "no message says anything"),
        (b"0", "conversation", "got a number"),
        (b"[" + b" " * (LINE_BYTES - 1) + b"]", "too large", "16,777,217 bytes, and 16,777,216 are the most"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_line_stops_with_its_number_or_is_skipped_and_counted(tmp_path, line, kind, words):
    records = [*RECORDS[:2], line, RECORDS[2]]
    with pytest.raises(DataError, match=r"data\.jsonl line 3: ") as error:
        cache_of(tmp_path, records)
    assert words in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]  # not even the cache's directory
    cache = cache_of(tmp_path, records, bad_lines="skip")
    assert content(cache) == expected(RECORDS[:3])
    assert [(skipped.file, skipped.line, skipped.kind) for skipped in cache.skipped] == [(str(tmp_path / "data.jsonl"), 3, kind)]
    assert words in cache.skipped[0].message
    assert len(cache.skipped[0].message) <= LONGEST_MESSAGE


@pytest.mark.parametrize("line", [json.dumps(chat("\\u0000")).encode(), json.dumps({"messages": chat("x"), "id": "\0"}).encode(), b"  \r"])
def test_what_only_looks_bad_is_good(tmp_path, line):
    """A backslash and u0000 as text, a NUL that is not trained on, a line of white space."""
    assert cache_of(tmp_path, [line, RECORDS[0]]).skipped == []


def test_a_line_that_is_as_long_as_may_be_is_read(tmp_path):
    start, end = json.dumps(RECORDS[0]).encode().rsplit(b"}", 1)
    line = start + b" " * (LINE_BYTES - len(start) - len(end) - 1) + b"}" + end
    assert len(line) == LINE_BYTES
    assert content(cache_of(tmp_path, [line, RECORDS[1]])) == expected(RECORDS[:2])
