import json

import numpy as np
import pytest
from chats import build, cache_of, chat, write_lines

from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, SourceConfig, TrainerConfig
from xtuner_hydra.data.batch import make_batch
from xtuner_hydra.data.mixture import Mixture, held_out
from xtuner_hydra.data.prepare import PreparedData, prepare, refuse_ids_without_a_row
from xtuner_hydra.data.tokenizers import ByteTokenizer
from xtuner_hydra.errors import ConfigError, DataError


def files(tmp_path):
    write_lines(tmp_path / "chats.jsonl", [chat("x" * n) for n in range(1, 41)])
    write_lines(tmp_path / "texts.jsonl", [{"text": "y" * n} for n in range(1, 21)])


def config_of(tmp_path, **options):
    data = DataConfig(pack_max_length=128, cache_dir=str(tmp_path / "cache"), **{"path": None, **options})
    return Config(model=ModelConfig(vocab_size=300), data=data, trainer=TrainerConfig(epochs=1, global_batch_size=2))


def mixture(tmp_path, ratios=(1.0, 1.0), **options):
    sources = [
        SourceConfig(path=str(tmp_path / "chats.jsonl"), sample_ratio=ratios[0]),
        SourceConfig(path=str(tmp_path / "texts.jsonl"), format="text", sample_ratio=ratios[1]),
    ]
    return config_of(tmp_path, sources=sources, **options)


def test_a_mixture_is_its_caches_one_after_the_other(tmp_path):
    files(tmp_path)
    caches = [build([tmp_path / "chats.jsonl"], tmp_path), build([tmp_path / "texts.jsonl"], tmp_path, format="text")]
    mixed = Mixture(caches)
    assert len(mixed) == 60
    for sample in range(60):
        cache, number = (caches[0], sample) if sample < 40 else (caches[1], sample - 40)
        assert mixed.ids(sample).tolist() == cache.ids(number).tolist()
        assert mixed.supervised(sample).tolist() == cache.supervised(number).tolist()
        assert mixed.locate(sample) == cache.locate(number)
        assert mixed.lengths[sample] == cache.lengths[number]
    assert mixed.fingerprint != Mixture(caches[::-1]).fingerprint


def test_each_source_counts_as_often_as_it_says(tmp_path):
    files(tmp_path)
    prepared = prepare(mixture(tmp_path, (0.5, 2.0)), ByteTokenizer(), progress=False)
    chosen = prepared.train.selection.samples
    assert (sum(chosen < 40), len(np.unique(chosen[chosen < 40]))) == (20, 20)
    assert np.bincount(chosen[chosen >= 40] - 40).tolist() == [2] * 20
    summary = "\n".join(prepared.summary())
    assert "source 0: 20 samples" in summary
    assert "source 1: 40 samples" in summary


def test_data_sample_ratio_is_of_the_whole(tmp_path):
    files(tmp_path)
    prepared = prepare(mixture(tmp_path, (0.5, 1.0), sample_ratio=2.0), ByteTokenizer(), progress=False)
    chosen = prepared.train.selection.samples
    assert (sum(chosen < 40), sum(chosen >= 40)) == (40, 40)


def test_a_worker_opens_the_same_mixture_and_data_json_has_each_source(tmp_path):
    files(tmp_path)
    config = mixture(tmp_path, (0.5, 2.0), eval_ratio=0.2)
    prepared = prepare(config, ByteTokenizer(), progress=False)
    prepared.save(tmp_path)
    sources = json.loads((tmp_path / "data.json").read_text())["train"]["sources"]
    assert [source["samples"] for source in sources] == [40, 20]
    assert sum(source["selected"]["samples"] for source in sources) == len(prepared.train.selection)
    loaded = PreparedData.load(tmp_path, config)
    assert loaded.summary() == prepared.summary()
    assert loaded.train.cache.fingerprint == prepared.train.cache.fingerprint
    assert loaded.eval.selection.samples.tolist() == prepared.eval.selection.samples.tolist()
    ours, theirs = (make_batch(data.train.cache, data.plan.epoch_packs(0), 0).ids.tolist() for data in (loaded, prepared))
    assert ours == theirs


def test_other_ratios_are_another_order_of_the_same_caches(tmp_path):
    files(tmp_path)
    first = prepare(mixture(tmp_path), ByteTokenizer(), progress=False)
    second = prepare(mixture(tmp_path, (1.0, 0.5)), ByteTokenizer(), progress=False)
    assert first.train.cache.fingerprint == second.train.cache.fingerprint
    orders = [prepared.plan.epoch_packs(0).sample.tolist() for prepared in (first, second)]
    assert orders[0] != orders[1]
    assert not any(part.built for part in second.train.cache.parts)


def test_a_bad_line_names_its_source(tmp_path):
    files(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DataError, match=r"data\.sources\[1\]\.path: .*texts\.jsonl line 2: expected an object with `text`"):
        prepare(mixture(tmp_path), ByteTokenizer(), progress=False)
    assert not (tmp_path / "cache").exists()


def test_what_is_held_out_is_apart_and_the_same_for_any_seed_order_and_packing(tmp_path):
    files(tmp_path)
    chats = str(tmp_path / "chats.jsonl")
    prepared = prepare(config_of(tmp_path, path=chats, eval_ratio=0.25), ByteTokenizer(), progress=False)
    held, trained = prepared.eval.selection.samples, prepared.train.selection.samples
    assert len(held) == 10
    assert sorted([*held, *trained]) == list(range(40))
    other = config_of(tmp_path, path=chats, eval_ratio=0.25, pack_strategy="soft", shuffle=False, sample_ratio=0.5)
    other.trainer.seed = 7
    again = prepare(other, ByteTokenizer(), progress=False)
    assert again.eval.selection.samples.tolist() == held.tolist()
    assert not set(again.train.selection.samples.tolist()) & set(held.tolist())
    assert len(again.train.selection) == 15  # half of what is left
    assert "held-out data: 10 of the 40 samples (eval_ratio 0.25)" in "\n".join(prepared.summary())


def test_equal_samples_are_on_one_side_wherever_they_stand(tmp_path):
    records = [chat("x" * (n % 7)) for n in range(40)]
    cache = cache_of(tmp_path, records)
    held = held_out(cache, 0.3)
    sides = {}
    for sample, side in enumerate(held.tolist()):
        assert sides.setdefault(json.dumps(records[sample]), side) == side
    (tmp_path / "turned").mkdir()
    turned = held_out(cache_of(tmp_path / "turned", records[::-1]), 0.3)
    assert turned.tolist() == held.tolist()[::-1]


def test_holding_out_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.eval_ratio=0\.5: holds out all of the 1 samples"):
        held_out(cache_of(tmp_path, [chat("a")]), 0.5)


def test_a_token_without_a_row_is_refused_with_its_place_and_the_remedy(tmp_path):
    write_lines(tmp_path / "data.jsonl", [{"text": "abc"}, {"text": "abz"}])
    config = config_of(tmp_path, path=str(tmp_path / "data.jsonl"), format="text")
    prepared = prepare(config, ByteTokenizer(), progress=False)
    refuse_ids_without_a_row((prepared.train, prepared.eval), 258, ByteTokenizer())
    with pytest.raises(ConfigError, match=r"model\.vocab_size=257: .*line 1 holds token 257 .*rows for 0 to 256; .*model\.vocab_size=260"):
        refuse_ids_without_a_row((prepared.train, prepared.eval), 257, ByteTokenizer())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "a", "sources": [SourceConfig(path="b")]}, "data.path is set too"),
        ({"path": None}, "data.path=null"),
        ({"sources": [SourceConfig(path="b", sample_ratio=0.0)]}, "data.sources[0].sample_ratio=0.0: must be a number above 0"),
        ({"sources": [SourceConfig(path="b"), SourceConfig(path=3)]}, "data.sources[1].path=3"),
        ({"sources": [SourceConfig(path="b", format="csv")]}, "data.sources[0].format=csv: must be one of"),
        ({"path": "a", "eval_ratio": 1.0}, "data.eval_ratio=1.0: must be above 0 and below 1"),
        ({"path": "a", "eval_ratio": 0.1, "eval_path": "b"}, "data.eval_path is set too"),
        ({"path": "a", "format": "alpacca"}, "Did you mean alpaca?"),
        ({"path": "a", "format": "my-module:f"}, "data.format=my-module:f: must be one of"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ConfigError) as error:
        DataConfig(**{"path": None, **options})
    assert words in str(error.value)
