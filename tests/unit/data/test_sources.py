import os
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_hydra.data import sources
from xtuner_hydra.data.bad_lines import BadLine
from xtuner_hydra.data.sources import blocks, chunks, lines, read_chunk, resolve_files
from xtuner_hydra.errors import DataError


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.json", "notes.txt", ".ipynb_checkpoints/a-checkpoint.jsonl", "deep/.c.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("b.jsonl", ["b.jsonl"]),
        ("notes.txt", ["notes.txt"]),
        (".", ["a.jsonl", "b.jsonl", "deep/er/c.json"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.json", ["deep/er/c.json"]),
        (["b.jsonl", "deep"], ["b.jsonl", "deep/er/c.json"]),
    ],
)
def test_a_file_a_directory_a_glob_or_a_list(tree, monkeypatch, path, files):
    monkeypatch.chdir(tree)
    assert [str(file) for file in resolve_files(path, "data.path")] == files


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.jsonl", "no such file or directory"),
        ("*.csv", "no file matches"),
        ("hollow", "without *.jsonl"),
        ("nothing.jsonl", "the file is empty"),
    ],
)
def test_what_cannot_be_read_is_refused_with_key_and_path(tree, monkeypatch, path, words):
    monkeypatch.chdir(tree)
    (tree / "hollow").mkdir()
    (tree / "nothing.jsonl").touch()
    with pytest.raises(DataError, match=r"data\.eval_path: ") as error:
        resolve_files(path, "data.eval_path")
    assert words in str(error.value)
    assert path in str(error.value)


def test_a_directory_is_read_through_links_each_once_and_in_capitals_too(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "D.JSONL").write_text("[]\n")
    (tree / "linked").symlink_to(elsewhere)
    (tree / "again").symlink_to(tree / "deep")
    (tree / "loop").symlink_to(tree)
    found = [str(file.relative_to(tree)) for file in resolve_files(str(tree), "data.path")]
    assert found == ["a.jsonl", "b.jsonl", "deep/er/c.json", "linked/D.JSONL"]


def test_a_file_without_permission_is_refused_by_name(tree, monkeypatch):
    secret = tree / "b.jsonl"
    monkeypatch.setattr(os, "access", lambda path, mode: path != secret)  # root may read all that chmod forbids
    with pytest.raises(DataError, match=r"data\.path: .*b\.jsonl: cannot be read"):
        resolve_files(str(tree), "data.path")


def test_a_file_that_goes_away_meanwhile_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        list(chunks(tmp_path / "gone.jsonl", 100))
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        list(read_chunk(tmp_path / "gone.jsonl", 0, 100))


ANYTHING = st.lists(st.one_of(st.sampled_from([b"\n", b"\r\n", b"\0", b"\xef\xbb\xbf", b" "]), st.binary(max_size=20)), max_size=30).map(
    b"".join
)
LIMIT = 24


def plainly(content):
    """(number, line, or what is wrong with it) as the documentation says, the obvious way."""
    found = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if b"\0" in line:
            found.append((number, ("NUL bytes", str(line.index(0) + 1))))
        elif len(line) > LIMIT:
            found.append((number, ("too large", str(len(line)))))
        elif line.rstrip():
            found.append((number, line.rstrip()))
    return found


def matches(found, expected):
    if isinstance(found, BadLine):
        return (found.kind, True) == (expected[0], re.search(rf"\b{expected[1]}\b", found.message) is not None)
    return found == expected


@settings(deadline=None)
@given(ANYTHING, st.integers(1, 64), st.integers(1, 64))
def test_any_bytes_in_any_pieces_are_the_same_lines(tmp_path_factory, content, size, block):
    """Cut into chunks for processes, and those read in blocks."""
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(content)
    found, before = [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "LINE_BYTES", LIMIT)
        patch.setattr(sources, "BLOCK", block)
        ranges = list(chunks(file, size))
        for start, stop in ranges:
            for piece in read_chunk(file, start, stop):
                pairs = [(1, piece)] if isinstance(piece, BadLine) else list(lines(piece))
                found += [(before + number, line) for number, line in pairs]
                before += 1 if isinstance(piece, BadLine) else piece.count(b"\n")
    expected = plainly(content)
    assert [number for number, _ in found] == [number for number, _ in expected]
    assert all(matches(line, plain) for (_, line), (_, plain) in zip(found, expected, strict=True)), (found, expected)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
    assert all(content[stop - 1 : stop] == b"\n" for _, stop in ranges[:-1])
    # cut at the first line end it could be
    assert all(b"\n" not in content[start + size : stop - 1] for start, stop in ranges)


class LongLine:
    """A stream of one long line, made as it is read."""

    def __init__(self, length, character):
        self.left, self.character = length, character

    def read(self, size):
        taken = min(size, self.left)
        self.left -= taken
        return self.character * taken


@pytest.mark.parametrize(("character", "kind"), [(b"x", "too large"), (b"\0", "NUL bytes")])
def test_a_line_of_half_a_gigabyte_is_passed_over_and_never_held(character, kind):
    stream = LongLine(1 << 29, character)
    tracemalloc.start()
    (bad,) = blocks(stream.read, 1 << 20, begins_file=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (bad.kind, "536,870,912" in bad.message) == (kind, True)
    assert peak < 4 * sources.LINE_BYTES


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf[1]\r\n[2]\r\n")
    ((start, stop),) = chunks(file, 100)
    (content,) = read_chunk(file, start, stop)
    assert list(lines(content)) == [(1, b"[1]"), (2, b"[2]")]


def test_blank_lines_count_but_do_not_come():
    assert list(lines(b"a\n\n  \nb")) == [(1, b"a"), (4, b"b")]
