"""The same records from every kind of file, with the numbers by which people find them."""

import gzip
import json

import pytest
from chats import build, chat, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner_hydra.data import readers, sources
from xtuner_hydra.data.bad_lines import BadLine
from xtuner_hydra.data.readers import records, split, unit
from xtuner_hydra.errors import DataError

RECORDS = [chat("é" * n, f"question {n}") for n in range(1, 40)]


def read(file, size=300):
    """(number in the file, decoded record) of each record, however the file is split."""
    found, before = [], 0
    for part in split(file, size):
        content = records(part)
        found += [(before + number, json.loads(record) if isinstance(record, bytes) else record) for number, record in content.pairs]
        before += content.count
    return found


def jsonl(path):
    return write_lines(path, RECORDS)


def gz(path):
    return compressed(path, jsonl(path.with_suffix("")).read_bytes())


def zst(path):
    return compressed(path, jsonl(path.with_suffix("")).read_bytes())


def compressed(path, content):
    """`content` in a file that is what its name says."""
    if path.suffix == ".zst":
        with pytest.importorskip("pyarrow").CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def parquet(path, rows=RECORDS):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.Table.from_pylist([{"messages": row} for row in rows]), path, row_group_size=10
    )
    return path


@pytest.mark.parametrize(("make", "name"), [(jsonl, "a.jsonl"), (gz, "a.jsonl.gz"), (zst, "a.jsonl.zst"), (jsonl, "a.json")])
def test_lines_are_lines_however_they_are_kept(tmp_path, make, name):
    assert read(make(tmp_path / name)) == list(enumerate(RECORDS, 1))


def test_rows_of_parquet_are_counted_over_its_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROWS", 4)
    file = parquet(tmp_path / "a.parquet")
    assert read(file) == [(number, {"messages": record}) for number, record in enumerate(RECORDS, 1)]
    assert (unit(file), unit(tmp_path / "a.jsonl")) == ("row", "line")


def test_what_parquet_fills_up_with_null_is_not_in_the_record(tmp_path):
    """All calls of a column have all arguments of any of them there."""
    calls = [[{"function": {"name": "f", "arguments": {"city": "K"}}}], [{"function": {"name": "g", "arguments": {"x": [1, 2]}}}], None]
    rows = [[{"role": "assistant", "content": "a", **({"tool_calls": call} if call else {})}] for call in calls]
    assert [record for _, record in read(parquet(tmp_path / "a.parquet", rows))] == [{"messages": row} for row in rows]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_a_json_array_of_records_has_the_lines_where_they_start(tmp_path, name, indent):
    wrapped = [{"messages": record} for record in RECORDS]
    text = "\ufeff\n\n" + json.dumps(wrapped, indent=indent)
    found = read(compressed(tmp_path / name, text.encode()))
    assert [record for _, record in found] == wrapped
    lines = text.splitlines()
    assert all(lines[number - 1].lstrip().startswith(("{", "[{")) for number, _ in found)
    assert len({number for number, _ in found}) == (len(wrapped) if indent else 1)


@pytest.mark.parametrize("limit", [16, 16 << 20])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_one_conversation_in_a_json_file_is_no_array_of_records(tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(readers, "LINE_BYTES", limit)
    assert read(compressed(tmp_path / name, json.dumps(RECORDS[0]).encode())) == [(1, RECORDS[0])]


@pytest.mark.parametrize("name", ["a.json.gz", "a.json.zst"])
def test_lines_in_a_compressed_json_file_are_still_read_in_parts(tmp_path, name):
    content = jsonl(tmp_path / "lines").read_bytes()
    assert len(list(split(compressed(tmp_path / name, content), 300))) > 5


def test_blank_lines_and_a_byte_order_mark_in_a_compressed_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf[1]\r\n\n[2]"))
    assert read(tmp_path / "a.jsonl.gz") == [(1, [1]), (3, [2])]


ANYTHING = st.lists(st.one_of(st.sampled_from([b"\n", b"\r\n", b"\0", b"[1]\n", b"\xef\xbb\xbf"]), st.binary(max_size=20)), max_size=30)


def raw(file, size):
    """(number, the line or what is wrong with it) of each record of `file`, which is no JSON array."""
    found, before = [], 0
    for part in split(file, size):
        assert part.content is None or isinstance(part.content, BadLine) or len(part.content) <= size + LIMIT
        content = records(part)
        found += [(before + number, (one.kind, one.message) if isinstance(one, BadLine) else one) for number, one in content.pairs]
        before += content.count
    return found


LIMIT = 24


@settings(deadline=None)
@given(ANYTHING.map(b"".join), st.lists(st.integers(1, 64), min_size=3, max_size=3))
def test_any_bytes_are_the_same_lines_compressed_or_not_whatever_the_size_of_the_parts(tmp_path_factory, content, sizes):
    pyarrow = pytest.importorskip("pyarrow")
    directory = tmp_path_factory.getbasetemp()
    plain, gz, zst = (directory / name for name in ("any.jsonl", "any.jsonl.gz", "any.jsonl.zst"))
    plain.write_bytes(content)
    gz.write_bytes(gzip.compress(content))
    with pyarrow.CompressedOutputStream(str(zst), "zstd") as stream:
        stream.write(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "LINE_BYTES", LIMIT)
        plainly, *others = (raw(file, size) for file, size in zip((plain, gz, zst), sizes, strict=True))
    assert others == [plainly, plainly]


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        (b'[\n{"a": 1},\n{"a": 2}\n]\n[\n{"a": 3}\n]', (4, "JSON", "something follows the end")),
        (b'[\n{"a": 1},\n{"a": 2}\n', (4, "JSON", "the file ends before")),
        (b'[\n{"a": 1},\n{"a": 2}\n{"a": 3}\n]', (4, "JSON", "a comma is missing before this item")),
        (b'[\n{"a": 1},\n{"a": 2},\n,{"a": 3}\n]', (4, "JSON", "Expecting value at line 4 column 1")),
        (b'[\n{"a": 1},\n{"a": 2},\n{"a" 3}\n]', (4, "JSON", "Expecting ':' delimiter at line 4 column 6")),
        (b'[\n{"a": 1},\n{"a": 2},\n{"a": "\0"}\n]', (4, "NUL bytes", "the rest of the list")),
        (b'[\n{"a": 1},\n{"a": 2},\n' + b"[" * 10**5 + b"\n]", (4, "nesting", "the rest of the list")),
        (b'[\n{"a": 1},\n{"a": 2},\n{"a": "' + b"x" * 100 + b'"}\n]', (4, "too large", "the item has 109 bytes")),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_json_array_tells_where_it_cannot_be_read_and_that_the_rest_is_lost(tmp_path, monkeypatch, text, bad):
    monkeypatch.setattr(readers, "LINE_BYTES", 50)
    (tmp_path / "a.json").write_bytes(text)
    (part,) = split(tmp_path / "a.json", 100)
    *good, (line, one) = records(part).pairs
    assert good == [(2, {"a": 1}), (3, {"a": 2})]
    assert (line, one.kind, bad[2] in one.message) == (bad[0], bad[1], True), one.message


def test_a_json_array_that_is_no_utf8_tells_the_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[\n{"a": 1},\n{"a": "\xff"}\n]')
    (part,) = split(tmp_path / "a.json", 100)
    ((line, bad),) = records(part).pairs
    assert (line, bad.kind) == (3, "UTF-8")


def test_a_row_of_parquet_that_is_too_large_is_bad_and_its_neighbours_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LINE_BYTES", 2000)
    file = parquet(tmp_path / "a.parquet", [RECORDS[0], chat("x" * 3000), RECORDS[1]])
    (part,) = split(file, 100)
    (_, first), (number, bad), (_, last) = records(part).pairs
    assert (first, last) == ({"messages": RECORDS[0]}, {"messages": RECORDS[1]})
    assert (number, bad.kind) == (2, "too large")


def test_the_same_samples_whatever_the_file(tmp_path):
    whole = build([jsonl(tmp_path / "plain.jsonl")], tmp_path)
    for file in (gz(tmp_path / "b.jsonl.gz"), zst(tmp_path / "c.jsonl.zst"), parquet(tmp_path / "d.parquet")):
        cache = build([file], tmp_path)
        assert [cache.ids(i).tolist() for i in range(len(cache))] == [whole.ids(i).tolist() for i in range(len(whole))]
        assert cache.lines.tolist() == whole.lines.tolist()


def test_every_record_of_an_array_on_one_line_is_a_sample(tmp_path):
    whole = build([jsonl(tmp_path / "plain.jsonl")], tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{"messages": record} for record in RECORDS]))
    cache = build([tmp_path / "a.json"], tmp_path)
    assert [cache.ids(i).tolist() for i in range(len(cache))] == [whole.ids(i).tolist() for i in range(len(whole))]
    assert set(cache.lines.tolist()) == {1}


@pytest.mark.parametrize(("name", "place"), [("a.jsonl.gz", "line 3"), ("a.parquet", "row 3"), ("a.json", "line 3")])
def test_what_is_wrong_is_told_with_its_place(tmp_path, name, place):
    rows = [*RECORDS[:2], [{"role": "robot", "content": "x"}], *RECORDS[3:]]
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet(path, rows)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(write_lines(tmp_path / "x", rows).read_bytes()))
    else:
        path.write_text("[" + ",\n".join(json.dumps({"messages": row}) for row in rows) + "]")
    with pytest.raises(DataError, match=rf"{name} {place}: message 1: role \"robot\""):
        build([path], tmp_path)
    cache = build([path], tmp_path, bad_lines="skip")
    assert (len(cache), len(cache.skipped), cache.skipped[0].line) == (len(RECORDS) - 1, 1, 3)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_it_is_called(tmp_path, name):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"[1]\n" * 10)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        list(split(tmp_path / name, 100))


def test_a_compressed_file_that_was_cut_is_refused(tmp_path):
    file = gz(tmp_path / "a.jsonl.gz")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be decompressed"):
        build([file], tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_what_needs_pyarrow_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"need pyarrow; pip install 'xtuner-hydra\[data\]'"):
        list(split(tmp_path / name, 100))
