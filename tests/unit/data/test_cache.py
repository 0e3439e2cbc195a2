import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
from chats import build, cache_of, chat, content, expected, write_lines

from xtuner_hydra.data import cache as cache_module
from xtuner_hydra.data.cache import STALE_SECONDS, CacheError, build_cache, open_cache
from xtuner_hydra.data.formats import PARSERS, parse_openai
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import ConfigError, DataError

RECORDS = [chat("x" * n, f"question {n}") for n in range(1, 40)]


def test_samples_come_back_whole_with_their_labels_and_lines(tmp_path):
    cache = cache_of(tmp_path, [RECORDS[0], b"", *RECORDS[1:]])
    assert content(cache) == expected(RECORDS)
    assert cache.lengths.tolist() == [len(ids) for ids, _ in expected(RECORDS)]
    assert cache.supervised_lengths.tolist() == [sum(supervised) for _, supervised in expected(RECORDS)]
    assert [cache.locate(sample)[1] for sample in (0, 1, 38)] == [1, 3, 40]


def test_the_second_time_it_is_found_not_made(tmp_path):
    def stamps(cache):
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in cache.directory.iterdir()}

    first = cache_of(tmp_path, RECORDS)
    before = stamps(first)
    second = cache_of(tmp_path, RECORDS)
    assert (first.built, second.built) == (True, False)
    assert stamps(second) == before
    assert content(first) == content(second)


def test_its_key_is_the_content_not_the_name_the_format_and_the_template(tmp_path, monkeypatch):
    first = cache_of(tmp_path, RECORDS)
    shutil.move(tmp_path / "data.jsonl", tmp_path / "renamed.jsonl")
    assert build([tmp_path / "renamed.jsonl"], tmp_path).fingerprint == first.fingerprint
    assert build([tmp_path / "renamed.jsonl"], tmp_path, template="xtuner").fingerprint != first.fingerprint
    monkeypatch.setitem(PARSERS, "other", parse_openai)
    assert build([tmp_path / "renamed.jsonl"], tmp_path, format="other").fingerprint != first.fingerprint
    assert cache_of(tmp_path, RECORDS[:-1]).fingerprint != first.fingerprint


def test_the_same_bytes_under_a_name_that_is_read_otherwise_are_another_one(tmp_path):
    """One array over several lines, and lines of which one can be used."""
    text = "[\n{}\n,\n{}\n]\n".format(*map(json.dumps, RECORDS[:2]))
    for name in ("data.jsonl", "data.json"):
        (tmp_path / name).write_text(text)
    lines, array = (build([tmp_path / name], tmp_path, bad_lines="skip") for name in ("data.jsonl", "data.json"))
    assert (len(lines.skipped), len(array.skipped)) == (3, 0)
    assert content(lines) == content(array)


def test_two_files_are_one_cache_that_knows_where_each_sample_is_from(tmp_path):
    files = [write_lines(tmp_path / "a.jsonl", RECORDS[:3]), write_lines(tmp_path / "b.jsonl", [b"", *RECORDS[3:5]])]
    cache = build(files, tmp_path)
    assert cache.sample_counts == [3, 2]
    assert [cache.locate(sample) for sample in range(5)] == [*((files[0], line) for line in (1, 2, 3)), (files[1], 2), (files[1], 3)]
    assert build(files[::-1], tmp_path).fingerprint != cache.fingerprint


class WideTokenizer(ByteTokenizer):
    """Ids above 65,535."""

    vocab_size = 1 << 17
    fingerprint = "wide"

    def __init__(self):
        pass

    def encode(self, conversation):
        return np.array([5, 70_000, 100_000], dtype=np.uint32), np.array([True, False, True])


def test_ids_of_a_large_vocabulary_are_kept_whole_and_the_first_token_is_never_a_label(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", RECORDS[:1])
    cache = build_cache([path], "openai", WideTokenizer(), bad_lines="error", cache_dir=tmp_path / "cache", num_workers=0, progress=False)
    assert content(cache) == [([5, 70_000, 100_000], [False, False, True])]
    assert cache.supervised_lengths.tolist() == [1]


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
    assert sorted(again.directory.parent.iterdir()) == [again.directory]  # the broken one is gone


def test_a_change_of_any_bit_of_its_description_is_noticed(tmp_path):
    cache = cache_of(tmp_path, [*RECORDS[:2], b"{"], bad_lines="skip")
    path = cache.directory / "meta.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(CacheError):
            open_cache(cache.directory, cache.files)
    path.write_bytes(whole)
    assert content(open_cache(cache.directory, cache.files)) == content(cache)


def test_a_worker_is_told_of_one_that_is_gone(tmp_path):
    cache = cache_of(tmp_path, RECORDS)
    shutil.rmtree(cache.directory)
    with pytest.raises(CacheError, match="missing"):
        open_cache(cache.directory, cache.files)


def test_one_that_another_process_has_published_first_is_not_ours_to_take_back(tmp_path, monkeypatch):
    write_lines(tmp_path / "data.jsonl", RECORDS)

    def publish_after_another(staging, directory):
        shutil.copytree(staging, directory)
        return publish(staging, directory)

    publish = cache_module._publish
    monkeypatch.setattr(cache_module, "_publish", publish_after_another)
    late = build([tmp_path / "data.jsonl"], tmp_path)
    assert not late.built
    assert content(late) == expected(RECORDS)


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


class AppendingTokenizer(ByteTokenizer):
    """Somebody writes into the file while it is read."""

    file = None

    def encode(self, conversation):
        with self.file.open("ab") as stream:
            stream.write(b"\n")
        return super().encode(conversation)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    tokenizer = AppendingTokenizer()
    tokenizer.file = write_lines(tmp_path / "data.jsonl", RECORDS[:2])
    with pytest.raises(DataError, match=r"data\.jsonl: changed while being read"):
        build_cache([tokenizer.file], "openai", tokenizer, bad_lines="error", cache_dir=tmp_path / "cache", num_workers=0, progress=False)
    assert list(tmp_path.iterdir()) == [tokenizer.file]


def test_what_a_killed_process_left_is_cleared_away_after_a_day_and_not_before(tmp_path):
    old, young, growing = (tmp_path / "cache" / f".{name}.tmp" for name in ("old", "young", "growing"))
    for path in (old, young, growing):
        path.mkdir(parents=True)
    (growing / "ids.bin").touch()  # a build that takes days touches its files, not their directory
    (old / "ids.bin").touch()
    long_ago = old.stat().st_mtime - STALE_SECONDS - 60
    for path in (old, old / "ids.bin", growing):
        os.utime(path, (long_ago, long_ago))
    cache = cache_of(tmp_path, RECORDS)
    assert sorted((tmp_path / "cache").iterdir()) == sorted([young, growing, cache.directory])


def test_a_refusal_leaves_other_caches_alone(tmp_path):
    good = cache_of(tmp_path, RECORDS)
    with pytest.raises(DataError):
        cache_of(tmp_path, [*RECORDS, b"{"])
    assert list((tmp_path / "cache").iterdir()) == [good.directory]


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match=r"no usable line .*1 skipped"):
        cache_of(tmp_path, [b"{"], bad_lines="skip")


def test_a_cache_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        cache_of(tmp_path, RECORDS)


class DeletingTokenizer(AppendingTokenizer):
    """Somebody removes the file while it is read."""

    def encode(self, conversation):
        self.file.unlink(missing_ok=True)
        return ByteTokenizer.encode(self, conversation)


def test_a_data_file_that_goes_away_is_not_blamed_on_the_cache_directory(tmp_path):
    tokenizer = DeletingTokenizer()
    tokenizer.file = write_lines(tmp_path / "data.jsonl", RECORDS[:2])
    with pytest.raises(DataError, match=r"data\.jsonl cannot be read: No such file"):
        build_cache([tokenizer.file], "openai", tokenizer, bad_lines="error", cache_dir=tmp_path / "cache", num_workers=0, progress=False)
