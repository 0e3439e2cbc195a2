import hashlib
import json
import shutil

import pytest
from chats import cache_of, chat, write_lines

from xtuner_hydra.config.schema import SourceConfig
from xtuner_hydra.data.prepare import EXAMPLES, PreparedData, describe_skipped, prepare
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import ConfigError, DataError


@pytest.mark.parametrize("as_sources", [False, True])
def test_a_worker_opens_the_same_data_without_reading_the_files(config, tmp_path, as_sources):
    if as_sources:
        config.data.path, config.data.sources = None, [SourceConfig(path=config.data.path)]
    prepared = prepare(config, ByteTokenizer(), progress=False)
    prepared.save(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    loaded = PreparedData.load(tmp_path, config)
    assert loaded.plan.total_steps == prepared.plan.total_steps
    assert loaded.train.cache.fingerprint == prepared.train.cache.fingerprint
    assert loaded.plan.epoch_packs(1).sample.tolist() == prepared.plan.epoch_packs(1).sample.tolist()
    assert (len(loaded.train.selection), len(loaded.eval.selection)) == (29, 4)
    assert loaded.summary() == prepared.summary()


def test_a_cache_that_has_gone_is_an_error_with_a_remedy(config, tmp_path):
    prepare(config, ByteTokenizer(), progress=False).save(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"meta\.json is missing; .* Start the run again"):
        PreparedData.load(tmp_path, config)


def test_a_cache_that_was_cut_is_an_error_too(config, tmp_path):
    prepared = prepare(config, ByteTokenizer(), progress=False)
    prepared.save(tmp_path)
    ids = prepared.eval.cache.directory / "ids.bin"
    whole = ids.read_bytes()
    ids.unlink()
    ids.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"ids\.bin has .* bytes, not"):
        PreparedData.load(tmp_path, config)


def test_another_pack_length_strategy_or_seed_uses_the_same_cache(config):
    first = prepare(config, ByteTokenizer(), progress=False)
    config.data.pack_max_length, config.data.pack_strategy, config.data.max_length, config.trainer.seed = 99, "soft", 60, 7
    second = prepare(config, ByteTokenizer(), progress=False)
    assert (first.train.cache.built, second.train.cache.built) == (True, False)
    assert second.train.cache.directory == first.train.cache.directory


@pytest.mark.parametrize(
    ("default", "second", "key"), [("openai", "nope:fn", r"data\.sources\[1\]\.format"), ("nope:fn", None, r"data\.format")]
)
def test_a_format_that_cannot_be_imported_is_refused_by_the_key_that_names_it(config, tmp_path, default, second, key):
    config.data.path, config.data.format = None, default
    config.data.sources = [SourceConfig(path=str(tmp_path / "train.jsonl"), format=one) for one in ("openai", second)]
    with pytest.raises(ConfigError, match=rf"^{key}=nope:fn: cannot be imported"):
        prepare(config, ByteTokenizer(), progress=False)


def test_skipped_lines_are_listed_in_the_run_directory_counted_and_announced(config, tmp_path):
    bad = {"train.jsonl": [b"{broken", b"{}", b"[1"], "held-out.jsonl": [b"\xff"]}
    for name, lines in bad.items():
        with (tmp_path / name).open("ab") as stream:
            stream.write(b"\n".join(lines) + b"\n")
    config.data.bad_lines = "skip"
    prepared = prepare(config, ByteTokenizer(), progress=False)
    prepared.save(tmp_path)
    listed = [json.loads(line) for line in (tmp_path / "bad_lines.jsonl").read_text().splitlines()]
    train, held = str(tmp_path / "train.jsonl"), str(tmp_path / "held-out.jsonl")
    places = [(train, 30, "JSON"), (train, 31, "empty"), (train, 32, "JSON"), (held, 5, "UTF-8")]
    assert [(line["file"], line["line"], line["kind"]) for line in listed] == places
    assert all(line["message"] for line in listed)
    saved = json.loads((tmp_path / "data.json").read_text())
    assert saved["bad_lines_file"] == "bad_lines.jsonl"
    assert (saved["train"]["bad_lines"], saved["eval"]["bad_lines"]) == ({"JSON": 2, "empty": 1}, {"UTF-8": 1})
    for data in (prepared, PreparedData.load(tmp_path, config)):
        assert "3 lines skipped (2 JSON, 1 empty)" in "\n".join(data.summary())


def test_skipped_lines_are_counted_by_kind_and_the_first_are_listed(tmp_path):
    cache = cache_of(tmp_path, [b"{", b"[", chat("x"), b"\xff", b"3"], bad_lines="skip")
    head, *listed = describe_skipped(cache.skipped)
    assert head == "4 lines skipped (2 JSON, 1 UTF-8, 1 conversation)"
    assert [line.partition(": ")[0] for line in listed] == [f"  {tmp_path}/data.jsonl line {number}" for number in (1, 2, 4)]
    assert describe_skipped([]) == []


def test_lines_of_a_file_that_is_both_trained_on_and_held_out_are_listed_once(config, tmp_path):
    write_lines(tmp_path / "train.jsonl", [*(chat("x" * n) for n in range(1, 30)), b"{"])
    config.data.bad_lines, config.data.eval_path, config.data.eval_ratio = "skip", None, 0.1
    prepare(config, ByteTokenizer(), progress=False).save(tmp_path)
    assert len((tmp_path / "bad_lines.jsonl").read_text().splitlines()) == 1


def test_a_run_that_is_resumed_with_mended_data_has_no_list_of_bad_lines(config, tmp_path):
    (tmp_path / "bad_lines.jsonl").write_text("of the run before\n")
    prepare(config, ByteTokenizer(), progress=False).save(tmp_path)
    assert not (tmp_path / "bad_lines.jsonl").exists()
    assert json.loads((tmp_path / "data.json").read_text())["bad_lines_file"] is None


def test_a_refused_held_out_file_takes_the_training_cache_back(config, tmp_path):
    (tmp_path / "held-out.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"data\.eval_path"):
        prepare(config, ByteTokenizer(), progress=False)
    assert not (tmp_path / "cache").exists()


OVERHEAD = len("\x00user\nq\x00\n\x00assistant\n\x00\n")  # a marker is one token; an answer of n bytes makes n + OVERHEAD of them


@pytest.mark.parametrize(("overlong", "words"), [("truncate", "9 truncated"), ("drop", "9 dropped as too long")])
def test_what_was_cut_or_left_out_is_counted_and_announced(config, overlong, words):
    config.data.max_length, config.data.overlong = OVERHEAD + 20, overlong  # answers of 21 to 29 bytes are longer
    summary = "\n".join(prepare(config, ByteTokenizer(), progress=False).summary())
    assert words in summary
    config.data.max_length = OVERHEAD + 29
    assert words.partition(" ")[2] not in "\n".join(prepare(config, ByteTokenizer(), progress=False).summary())


def test_samples_that_teach_nothing_are_counted_and_announced(config, tmp_path):
    write_lines(tmp_path / "train.jsonl", [chat("x", "q" * 200), chat("x"), [*chat("x")[:1], {**chat("x")[1], "loss": False}]])
    prepared = prepare(config, ByteTokenizer(), progress=False)
    assert "1 samples -> 1 packs" in "\n".join(prepared.summary())
    assert "2 left out without a supervised token" in "\n".join(prepared.summary())


def test_data_json_tells_contents_apart(config, tmp_path):
    """By the hash that sha256sum gives, also where the cache was there already."""
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("train.jsonl", "held-out.jsonl")]
    for _ in range(2):
        prepare(config, ByteTokenizer(), progress=False).save(tmp_path)
        saved = json.loads((tmp_path / "data.json").read_text())
        assert [saved[part]["hashes"] for part in ("train", "eval")] == [[digest] for digest in digests]
        assert saved["train"]["sources"][0]["cache"].endswith(saved["train"]["fingerprint"])


def test_the_examples_as_held_out_data_of_others_are_announced(config, caplog):
    """`data.path=FILE` alone leaves data.eval_path as it is."""
    words = "held-out data is the example that ships with xtuner_hydra"
    prepare(config, ByteTokenizer(), progress=False)
    assert words not in caplog.text
    config.data.eval_path = str(EXAMPLES / "openai_sft_heldout.jsonl")
    prepare(config, ByteTokenizer(), progress=False)
    assert words in caplog.text
    caplog.clear()
    config.data.path = str(EXAMPLES / "openai_sft.jsonl")
    prepare(config, ByteTokenizer(), progress=False)
    assert words not in caplog.text


def test_held_out_data_that_is_trained_on_is_announced(config, tmp_path, caplog):
    prepare(config, ByteTokenizer(), progress=False)
    assert "trained on too" not in caplog.text
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "held-out.jsonl")  # another name, the same content
    for _ in range(2):  # with and without token caches
        caplog.clear()
        prepare(config, ByteTokenizer(), progress=False)
        assert f"held-out data that is trained on too: {tmp_path / 'held-out.jsonl'}" in caplog.text
