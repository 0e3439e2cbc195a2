import hashlib
import json
import shutil

import pytest
from chats import chat, write_lines

from xtuner_hydra.config.schema import Config, DataConfig, TrainerConfig
from xtuner_hydra.data.prepare import PreparedData, prepare
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import DataError


@pytest.fixture
def config(tmp_path):
    write_lines(tmp_path / "train.jsonl", [chat("x" * n) for n in range(1, 30)])
    write_lines(tmp_path / "held-out.jsonl", [chat("y" * n) for n in range(1, 5)])
    data = DataConfig(
        path=str(tmp_path / "train.jsonl"),
        eval_path=str(tmp_path / "held-out.jsonl"),
        pack_max_length=128,
        cache_dir=str(tmp_path / "cache"),
    )
    return Config(data=data, trainer=TrainerConfig(epochs=2, global_batch_size=2))


def test_a_worker_opens_the_same_data_without_reading_the_files(config, tmp_path):
    prepared = prepare(config, ByteTokenizer(), progress=False)
    prepared.save(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    loaded = PreparedData.load(tmp_path, config)
    assert loaded.plan.total_steps == prepared.plan.total_steps
    assert loaded.plan.fingerprint == prepared.plan.fingerprint
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


def test_skipped_lines_are_listed_in_the_run_directory_and_announced(config, tmp_path):
    with (tmp_path / "train.jsonl").open("ab") as stream:
        stream.write(b"{broken\n")
    config.data.bad_lines = "skip"
    prepared = prepare(config, ByteTokenizer(), progress=False)
    prepared.save(tmp_path)
    (skipped,) = json.loads((tmp_path / "data.json").read_text())["train"]["skipped_lines"]
    assert (skipped["file"], skipped["line"], skipped["kind"]) == (str(tmp_path / "train.jsonl"), 30, "JSON")
    for data in (prepared, PreparedData.load(tmp_path, config)):
        assert "1 lines skipped (1 JSON)" in "\n".join(data.summary())


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
