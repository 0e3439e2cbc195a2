"""Saving at once and behind training: the same bytes, of the moment at which it was asked for, one after the other, and never silently lost."""

import copy
import os
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_checkpoint
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from xtuner_hydra.build import build_engine
from xtuner_hydra.checkpoint import saver as saver_module
from xtuner_hydra.checkpoint import state as states
from xtuner_hydra.checkpoint import storage
from xtuner_hydra.checkpoint.commit import commit, committed, damage, step_of
from xtuner_hydra.checkpoint.saver import Saver
from xtuner_hydra.checkpoint.state import Snapshot, TrainState
from xtuner_hydra.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.errors import RefusedError, SaveError
from xtuner_hydra.parallel.runtime import runtime
from xtuner_hydra.trainer import Trainer

CONFIG = Config(
    model=ModelConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
        tokenizer="byte",
    ),
    data=DataConfig(path="unused"),
    parallelism=ParallelismConfig(param_dtype="float32"),
    trainer=TrainerConfig(seed=5, device="cpu"),
)
WAIT = timedelta(seconds=60)
GUESS = 30.0


def stepped(place, seed=0):
    """An engine after one step of the optimizer along made-up gradients: a function of `seed` alone."""
    engine = build_engine(CONFIG, place)
    torch.manual_seed(seed)
    for parameter in engine.model.parameters():
        parameter.grad = torch.rand_like(parameter)
    engine.optimizers[0].step()
    engine.optimizers[0].zero_grad()
    return engine


@pytest.fixture(scope="module")
def place():
    with runtime(CONFIG) as here:
        yield here


@pytest.fixture
def saver(tmp_path, place):
    made = Saver(tmp_path / "checkpoints", CheckpointConfig(asynchronous=True, keep=9), WAIT, GUESS)
    yield made
    made.close()


def snapshot(engine, step):
    tensors = states.trained_tensors(engine.model, engine.optimizers)
    return Snapshot(tensors, TrainState(step=step, evaluation={"eval/loss": 1.5}), {"trainer.seed": 5}, states.rng_state())


def same_bytes(directory, other):
    """Fails unless both hold the same files, to the last bit."""
    contents, others = ({path.name: path.read_bytes() for path in one.iterdir()} for one in (directory, other))
    assert contents.keys() == others.keys()
    assert [name for name in contents if contents[name] != others[name]] == []


def overwrite(engine):
    """Every weight and moment, in place, as a step would."""
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(100)
            for value in engine.optimizers[0].state[parameter].values():
                value.fill_(-7)


def held_back(monkeypatch):
    """Saves that come no further than their thread until the event is set."""
    go = threading.Event()

    def late(*args, **options):
        assert go.wait(60)
        return commit(*args, **options)

    monkeypatch.setattr(saver_module, "commit", late)
    return go


def test_behind_training_the_same_bytes_are_written(tmp_path, saver, place):
    taken = snapshot(stepped(place), 3)
    saver.save(taken)
    saver.wait()
    Saver(tmp_path / "at once", CheckpointConfig(), WAIT, GUESS).save(taken)
    same_bytes(saver.directory / "step-3", tmp_path / "at once" / "step-3")
    assert damage(saver.directory / "step-3", content=True) is None


def test_what_is_written_is_of_the_moment_of_the_save(tmp_path, saver, place, monkeypatch):
    engine = stepped(place)
    Saver(tmp_path / "before", CheckpointConfig(), WAIT, GUESS).save(taken := snapshot(engine, 3))
    go = held_back(monkeypatch)
    saver.save(taken)
    overwrite(engine)
    go.set()
    saver.wait()
    same_bytes(saver.directory / "step-3", tmp_path / "before" / "step-3")


def test_copies_of_an_earlier_save_do_not_come_again(tmp_path, saver, place):
    engine = stepped(place)
    saver.save(snapshot(engine, 1))
    overwrite(engine)
    saver.save(taken := snapshot(engine, 2))
    saver.wait()
    Saver(tmp_path / "at once", CheckpointConfig(), WAIT, GUESS).save(taken)
    same_bytes(saver.directory / "step-2", tmp_path / "at once" / "step-2")


def test_a_trainer_that_goes_on_does_not_change_the_state_that_is_being_saved(tmp_path, saver, place, monkeypatch):
    engine, state = stepped(place), TrainState(step=3, tokens=300)
    trainer = SimpleNamespace(
        run_dir=tmp_path, runtime=place, engine=engine, saver=saver, state=state, trajectory={}, rng=states.rng_state()
    )
    trainer.warn_of_changed_data = lambda: None
    go = held_back(monkeypatch)
    Trainer.save(trainer)
    rng = copy.deepcopy(trainer.rng)
    torch.rand(5)
    state.advance(epoch=1, tokens=100, updated=False)
    trainer.rng = states.rng_state()
    go.set()
    saver.wait()
    other = stepped(place, seed=1)
    found = states.load(saver.directory / "step-3", other.model, other.optimizers)
    assert found == TrainState(step=3, tokens=300)
    assert states.rng_state() == rng


def test_what_is_read_back_is_what_was_saved(saver, place):
    engine, other = stepped(place), stepped(place, seed=9)
    saver.save(snapshot(engine, 3))
    saver.wait()
    states.load(saver.directory / "step-3", other.model, other.optimizers)
    saved, read = (states.trained_tensors(one.model, one.optimizers) for one in (engine, other))
    assert saved.keys() == read.keys()
    for name in saved:
        assert torch.equal(local(saved[name]), local(read[name])), name


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def test_no_file_of_a_checkpoint_is_a_pickle(saver, place):
    saver.save(snapshot(stepped(place), 3))
    saver.wait()
    files = {path.name: path.read_bytes() for path in (saver.directory / "step-3").iterdir()}
    assert set(files) == {"rank-0.safetensors", "tensors.json", "state.json", "rng-0.json", "manifest.json"}
    for name, content in files.items():
        assert content[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), name  # zip (torch.save), pickle


def test_there_are_never_two_saves_at_once(saver, place, monkeypatch):
    under_way, most = [], []

    def slow(path, *args, **options):
        under_way.append(path)
        most.append(len(under_way))
        time.sleep(0.2)
        under_way.remove(path)
        return commit(path, *args, **options)

    monkeypatch.setattr(saver_module, "commit", slow)
    engine = stepped(place)
    for step in (1, 2, 3):
        saver.save(snapshot(engine, step))
        assert [step_of(path) for path in committed(saver.directory)] == list(range(1, step))  # the one before has ended
    saver.wait()
    assert most == [1, 1, 1]
    assert [step_of(path) for path in committed(saver.directory)] == [1, 2, 3]


@pytest.mark.parametrize("told_by", ["wait", "save"])
def test_a_failure_behind_training_is_told_once(saver, place, told_by):
    saver.directory.write_text("a file, where a directory should be")
    engine = stepped(place)
    assert not saver.failed()
    saver.save(snapshot(engine, 1))
    end = time.monotonic() + 30
    while not saver.failed():
        assert time.monotonic() < end
        time.sleep(0.01)
    saver.directory.unlink()
    with pytest.raises(SaveError, match=r"step-1 could not be saved: Not a directory"):
        saver.wait() if told_by == "wait" else saver.save(snapshot(engine, 2))
    assert not saver.failed()
    saver.save(snapshot(engine, 3))
    saver.wait()
    assert [step_of(path) for path in committed(saver.directory)] == [3]


def test_closing_lets_a_save_end(saver, place, monkeypatch):
    go = held_back(monkeypatch)
    saver.save(snapshot(stepped(place), 1))
    threading.Timer(0.2, go.set).start()
    saver.close()
    assert [step_of(path) for path in committed(saver.directory)] == [1]


def test_what_a_save_takes_is_reckoned_from_the_last_one(saver, place):
    assert saver.expected_seconds() == 2 * GUESS
    saver.save(snapshot(stepped(place), 1))
    saver.wait()
    assert 0 < saver.expected_seconds() == 2 * saver.seconds < 2 * GUESS


def test_old_ones_go_with_each_save(tmp_path, place):
    saver = Saver(tmp_path, CheckpointConfig(keep=1), WAIT, GUESS)
    (tmp_path / ".step-9.tmp").mkdir()
    for step in (1, 2):
        saver.save(snapshot(stepped(place), step))
    assert os.listdir(tmp_path) == ["step-2"]


@pytest.mark.parametrize("harm", ["{", "[]", '{"model.model.norm.weight": {}}', "{}"])
def test_a_checkpoint_with_another_index_is_refused_in_words(tmp_path, place, harm):
    engine = stepped(place)
    Saver(tmp_path, CheckpointConfig(), WAIT, GUESS).save(snapshot(engine, 1))
    (tmp_path / "step-1" / "tensors.json").write_text(harm)
    with pytest.raises(RefusedError, match=r"step-1: its tensors do not fit the model of config\.yaml") as error:
        states.load(tmp_path / "step-1", engine.model, engine.optimizers)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_step_without_its_files_is_refused(tmp_path, place):
    made = make_checkpoint(tmp_path, 1)
    engine = stepped(place)
    with pytest.raises(RefusedError, match=r"tensors\.json"):
        states.load(made, engine.model, engine.optimizers)


def fail_on_a_rank(directory):
    """The second rank's disk is full, at once and behind training; then there is room again."""
    with runtime(CONFIG) as place:
        engine, told = stepped(place), []
        for name, asynchronous in (("at once", False), ("behind", True)):
            saver = Saver(directory / name, CheckpointConfig(asynchronous=asynchronous), WAIT, GUESS)
            save_file = storage.save_file
            if place.rank == 1:
                storage.save_file = full_disk
            try:
                saver.save(snapshot(engine, 1))
                saver.wait()
            except SaveError as error:
                told.append(str(error))
            storage.save_file = save_file
            saver.save(snapshot(engine, 2))
            saver.wait()
            saver.close()
        return told


def full_disk(tensors, path):
    raise OSError(28, "No space left on device", str(path))


def test_a_rank_that_cannot_write_fails_all_by_its_name(tmp_path):
    first, second = run_on_ranks(fail_on_a_rank, 2, tmp_path)
    assert first == second
    for name, message in zip(("at once", "behind"), first, strict=True):
        assert f"{tmp_path / name}/step-1 could not be saved (rank 1): No space left on device" in message
        assert [step_of(path) for path in committed(tmp_path / name)] == [2]
        assert damage(tmp_path / name / "step-2", content=True) is None
    same_bytes(tmp_path / "at once" / "step-2", tmp_path / "behind" / "step-2")
