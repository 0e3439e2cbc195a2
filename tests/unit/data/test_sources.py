import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_hydra.data.sources import chunks, lines, read_chunk, resolve_files
from xtuner_hydra.errors import DataError


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.json", "notes.txt"):
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


def test_a_file_without_permission_is_refused_by_name(tree, monkeypatch):
    secret = tree / "b.jsonl"
    monkeypatch.setattr(os, "access", lambda path, mode: path != secret)  # root may read all that chmod forbids
    with pytest.raises(DataError, match=r"data\.path: .*b\.jsonl: cannot be read"):
        resolve_files(str(tree), "data.path")


def test_a_file_that_goes_away_meanwhile_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        list(chunks(tmp_path / "gone.jsonl", 100))
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        read_chunk(tmp_path / "gone.jsonl", 0, 100)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b" ")), min_size=1, max_size=30), st.integers(1, 64))
def test_chunks_cover_the_file_in_whole_lines(tmp_path_factory, content, size):
    file = tmp_path_factory.mktemp("chunks") / "file"
    file.write_bytes(b"\n".join(content))
    pieces = [read_chunk(file, start, stop) for start, stop in chunks(file, size)]
    assert b"".join(pieces) == file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert all(len(piece[:-1].rpartition(b"\n")[0]) < size for piece in pieces)  # cut at the first line end it could be


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf[1]\r\n[2]\r\n")
    ((start, stop),) = chunks(file, 100)
    assert list(lines(read_chunk(file, start, stop))) == [(1, b"[1]"), (2, b"[2]")]


def test_blank_lines_count_but_do_not_come():
    assert list(lines(b"a\n\n  \nb")) == [(1, b"a"), (4, b"b")]
