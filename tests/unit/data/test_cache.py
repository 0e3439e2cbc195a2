import json
import multiprocessing
import shutil

import numpy as np
import pytest
from chats import build, cache_of, chat, write_lines

from xtuner_hydra.data import cache as cache_module
from xtuner_hydra.data.cache import CacheError, open_cache
from xtuner_hydra.data.formats import parse_openai
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import ConfigError, DataError

RECORDS = [chat("x" * n, f"question {n}") for n in range(1, 40)]


def content(cache):
    return [(cache.ids(i).tolist(), cache.supervised(i).tolist()) for i in range(len(cache))]


def expected(records):
    return [tuple(array.tolist() for array in ByteTokenizer().encode(parse_openai(record))) for record in records]


def test_samples_come_back_whole_with_their_labels_and_lines(tmp_path):
    cache = cache_of(tmp_path, [RECORDS[0], b"", *RECORDS[1:]])
    assert content(cache) == expected(RECORDS)
    assert cache.lengths.tolist() == [len(ids) for ids, _ in expected(RECORDS)]
    assert cache.supervised_lengths.tolist() == [sum(supervised) for _, supervised in expected(RECORDS)]
    assert [cache.locate(sample)[1] for sample in (0, 1, 38)] == [1, 3, 40]


def test_the_second_time_it_is_found_not_made(tmp_path):
    first, second = cache_of(tmp_path, RECORDS), cache_of(tmp_path, RECORDS)
    assert (first.built, second.built) == (True, False)
    assert content(first) == content(second)


def test_its_key_is_the_content_not_the_name_and_the_template(tmp_path):
    first = cache_of(tmp_path, RECORDS)
    shutil.move(tmp_path / "data.jsonl", tmp_path / "renamed.jsonl")
    assert build([tmp_path / "renamed.jsonl"], tmp_path).fingerprint == first.fingerprint
    assert build([tmp_path / "renamed.jsonl"], tmp_path, template="xtuner").fingerprint != first.fingerprint
    assert cache_of(tmp_path, RECORDS[:-1]).fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["ids.bin", "supervised.bin", "index.bin", "meta.json"])
@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
def test_a_broken_one_is_built_again(tmp_path, name, how):
    first = cache_of(tmp_path, RECORDS)
    before, path = content(first), first.directory / name
    whole = path.read_bytes()
    path.unlink()  # the file is mapped; a new one takes its name
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    if how == "changed":
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    again = cache_of(tmp_path, RECORDS)
    assert again.built
    assert content(again) == before


def test_a_worker_is_told_of_one_that_is_gone(tmp_path):
    cache = cache_of(tmp_path, RECORDS)
    shutil.rmtree(cache.directory)
    with pytest.raises(CacheError, match="missing"):
        open_cache(cache.directory, cache.files)


def build_in_a_process(directory, results):
    results.put(content(build([directory / "data.jsonl"], directory)))


def test_two_processes_may_build_the_same_one_at_once(tmp_path):
    write_lines(tmp_path / "data.jsonl", RECORDS * 50)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=build_in_a_process, args=(tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert results.get(timeout=60) == results.get(timeout=60) == expected(RECORDS * 50)
    for process in processes:
        process.join()
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no staging directory is left


def test_many_chunks_by_two_processes_are_one_file_read_in_one_go(tmp_path, monkeypatch):
    records = [RECORDS[0], b"", b"{broken", *RECORDS[1:]]
    serial = cache_of(tmp_path, records, bad_lines="skip")
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", 300)
    monkeypatch.setattr(cache_module, "SERIAL_BYTES", 0)
    (tmp_path / "elsewhere").mkdir()
    parallel = build(serial.files, tmp_path / "elsewhere", bad_lines="skip", num_workers=2)
    assert content(parallel) == content(serial)
    np.testing.assert_array_equal(parallel.lines, serial.lines)
    assert [line.line for line in parallel.skipped] == [line.line for line in serial.skipped] == [3]


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        (b"{broken", "JSON", "not valid JSON"),
        (b'["\xff"]', "UTF-8", "byte 3 is 0xff"),
        (json.dumps([{"role": "robot", "content": ""}]).encode(), "conversation", "robot"),
        (rb'[{"role": "assistant", "content": "\ud800"}]', "conversation", "surrogate"),
        (b"[" * 100_000, "JSON", "not usable JSON"),
    ],
)
def test_a_bad_line_stops_with_its_number_or_is_skipped_and_counted(tmp_path, line, kind, words):
    records = [*RECORDS[:2], line, RECORDS[2]]
    with pytest.raises(DataError, match=r"data\.jsonl line 3: ") as error:
        cache_of(tmp_path, records)
    assert words in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]  # not even the cache's directory
    cache = cache_of(tmp_path, records, bad_lines="skip")
    assert content(cache) == expected(RECORDS[:3])
    assert [(skipped.line, skipped.kind) for skipped in cache.skipped] == [(3, kind)]


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match=r"no usable line .*1 skipped"):
        cache_of(tmp_path, [b"{"], bad_lines="skip")


def test_a_cache_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        cache_of(tmp_path, RECORDS)
