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
    with pytest.raises(DataError, match="Start the run again"):
        PreparedData.load(tmp_path, config)


def test_a_refused_held_out_file_takes_the_training_cache_back(config, tmp_path):
    (tmp_path / "held-out.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"data\.eval_path"):
        prepare(config, ByteTokenizer(), progress=False)
    assert not (tmp_path / "cache").exists()


def test_what_was_cut_or_left_out_is_announced(config):
    config.data.max_length = 40
    assert "truncated" in "\n".join(prepare(config, ByteTokenizer(), progress=False).summary())
