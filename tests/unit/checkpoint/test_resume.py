"""Where a run goes on: at the newest whole checkpoint, and only if what follows is the same run."""

from contextlib import nullcontext

import pytest
from checkpoints import flip_bit, make_checkpoint, make_export
from run_dirs import make_config

from xtuner_hydra.checkpoint import resume
from xtuner_hydra.checkpoint.state import trajectory
from xtuner_hydra.config.schema import CheckpointConfig
from xtuner_hydra.errors import RefusedError


@pytest.fixture
def run(tmp_path):
    for step in (2, 4, 10):
        make_checkpoint(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def find(resume_, run):
    return resume.find(CheckpointConfig(resume=str(resume_)), run)


def test_never_is_never(run):
    assert find("never", run) is None


def test_auto_is_the_newest(run, warnings):
    assert find("auto", run) == run / "checkpoints" / "step-10"
    assert warnings() == []


def test_one_that_was_set_aside_and_cannot_be_put_back_is_named(run, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(source))

    aside = run / "checkpoints" / ".step-9.replaced"
    aside.mkdir()
    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(RefusedError, match=rf"{aside}: was set aside .*: Permission denied"):
        resume.find(CheckpointConfig(resume="auto"), run)


def test_auto_without_a_checkpoint_starts_at_step_0(tmp_path):
    assert find("auto", tmp_path / "new") is None


def test_auto_passes_over_damaged_ones_and_says_so(run, warnings):
    flip_bit(run / "checkpoints" / "step-10" / "rank-0.safetensors")
    (run / "checkpoints" / "step-4" / "state.json").unlink()
    assert find("auto", run) == run / "checkpoints" / "step-2"
    assert warnings() == [
        f"{run}/checkpoints/step-10 is skipped: rank-0.safetensors differs from what was saved",
        f"{run}/checkpoints/step-4 is skipped: state.json is missing",
    ]


@pytest.mark.parametrize("name", ["hf", "hf/step-4"])
def test_an_export_is_refused_by_its_name(run, name):
    make_export(run / "hf", 4)
    with pytest.raises(RefusedError, match=r"step-4 is an export, which has no optimizer state; .*model.pretrained="):
        find(run / name, run)


def test_where_none_is_whole_nothing_is_overwritten(run):
    for path in (run / "checkpoints").iterdir():
        flip_bit(path / "state.json")
    with pytest.raises(RefusedError, match=r"all its checkpoints are damaged \(the oldest: state.json .*another directory, or remove"):
        find("auto", run)


@pytest.mark.parametrize(("path", "found"), [("run", 10), ("run/checkpoints", 10), ("run/checkpoints/step-4", 4), ("run/checkpoints/", 10)])
def test_a_path_is_a_run_its_checkpoints_or_one_of_them(run, monkeypatch, path, found):
    monkeypatch.chdir(run.parent)
    assert find(path, run.parent / "another") == run / "checkpoints" / f"step-{found}"


def test_a_run_may_be_called_like_a_step(run):
    other = run.rename(run.with_name("step-by-step"))
    assert find(other, run) == other / "checkpoints" / "step-10"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("run/checkpoints/step-5", "no such file"),
        ("run/elsewhere", "no such file"),
        (".", "holds no checkpoint"),
        ("run/checkpoints/step-4", "not a complete checkpoint"),
    ],
)
def test_a_path_that_leads_to_none_is_refused(run, monkeypatch, path, words):
    monkeypatch.chdir(run.parent)
    flip_bit(run / "checkpoints" / "step-4" / "state.json")
    with pytest.raises(RefusedError, match=f"checkpoint.resume={path}: {words}"):
        find(path, run)


def config_of(**changes):
    """A config with `changes` by full key, `__` for the dot."""
    config = make_config(1e-4)
    config.trainer.global_batch_size = 8
    for key, value in changes.items():
        *groups, name = key.split("__")
        owner = config
        for group in groups:
            owner = getattr(owner, group)
        assert getattr(owner, name) != value, "no change"
        setattr(owner, name, value)
    return config


def refuse(tmp_path, changes, content="files", allowed=()):
    checkpoint = make_checkpoint(tmp_path, 3, trajectory=trajectory(config_of(), "files"))
    resume.refuse_other_trajectory(checkpoint, trajectory(config_of(**changes), content), list(allowed))


CHANGES = [
    ("data.pack_max_length", {"data__pack_max_length": 17}),
    ("data.shuffle", {"data__shuffle": False}),
    ("data.sample_ratio", {"data__sample_ratio": 0.5}),
    ("trainer.seed", {"trainer__seed": 7}),
    ("trainer.global_batch_size", {"trainer__global_batch_size": 4}),
    ("trainer.freeze", {"trainer__freeze": ["embed"]}),
    ("model.hidden_size", {"model__hidden_size": 4096}),
    ("model.tie_word_embeddings", {"model__tie_word_embeddings": True}),
    ("optimizer.name", {"optimizer__name": "muon"}),
]


@pytest.mark.parametrize(("key", "changes"), CHANGES, ids=[key for key, _ in CHANGES])
def test_what_alters_the_trajectory_is_refused_by_name(tmp_path, key, changes):
    with pytest.raises(RefusedError, match=rf"different settings \({key}: .* -> "):
        refuse(tmp_path, changes)


@pytest.mark.parametrize(("key", "changes"), CHANGES, ids=[key for key, _ in CHANGES])
def test_what_needs_no_other_tensors_can_be_allowed(tmp_path, key, changes):
    if key.startswith(("data.", "trainer.seed", "trainer.global")):
        with pytest.raises(RefusedError, match=rf"or accept .*checkpoint.allow_change=\[{key}\]"):
            refuse(tmp_path, changes)
        refuse(tmp_path / "again", changes, allowed=[key])
    else:
        with pytest.raises(RefusedError, match=rf"it has no tensors for another {key}"):
            refuse(tmp_path, changes, allowed=[key, key.partition(".")[0]])


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize(
    ("before", "now", "can_be"),
    [(None, MOE, False), (MOE, MOE | {"num_experts": 8}, False), (MOE, MOE | {"num_experts_per_tok": 1}, True)],
)
def test_of_experts_only_what_leaves_their_weights_can_be_allowed(tmp_path, before, now, can_be):
    checkpoint = make_checkpoint(tmp_path, 3, trajectory={"model.moe": before})
    with nullcontext() if can_be else pytest.raises(RefusedError, match="no tensors"):
        resume.refuse_other_trajectory(checkpoint, {"model.moe": now}, ["model"])


def test_with_another_optimizer_its_momentum_is_not_named(tmp_path):
    with pytest.raises(RefusedError, match=r"different settings \(optimizer\.name: adamw -> sgd\)\. Give"):
        refuse(tmp_path, {"optimizer__name": "sgd"})


def test_momentum_that_comes_or_goes_is_refused(tmp_path):
    """Of sgd, which keeps nothing without it."""
    sgd = config_of(optimizer__name="sgd")
    checkpoint = make_checkpoint(tmp_path, 3, trajectory=trajectory(sgd, "files"))
    sgd.optimizer.momentum = 0.5
    resume.refuse_other_trajectory(checkpoint, trajectory(sgd, "files"), [])
    sgd.optimizer.momentum = 0.0
    with pytest.raises(RefusedError, match=r"different settings \(optimizer\.momentum: 0\.95 -> 0"):
        resume.refuse_other_trajectory(checkpoint, trajectory(sgd, "files"), [])


def test_other_data_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"different settings \(data\.path .*: files -> other files"):
        refuse(tmp_path, {}, content="other files")


@pytest.mark.parametrize("ratio", [None, 0.1])
def test_other_data_of_which_a_share_is_held_out_leaks_and_says_so(tmp_path, warnings, ratio):
    checkpoint = make_checkpoint(tmp_path, 3, trajectory=trajectory(config_of(), "files") | {"data.eval_ratio": ratio})
    resume.refuse_other_trajectory(checkpoint, trajectory(config_of(), "other files") | {"data.eval_ratio": ratio}, ["data"])
    assert any("holds out other samples than before" in text for text in warnings()) == (ratio is not None)


def test_all_that_differs_is_listed(tmp_path):
    with pytest.raises(RefusedError) as error:
        refuse(tmp_path, dict(one for _, changes in CHANGES for one in changes.items()), content="other files")
    for key, _ in CHANGES:
        assert f"{key}: " in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__log_interval": 99},
        {"parallelism__nproc_per_node": 5},
        {"parallelism__recompute_ratio": 0.5},
        {"data__num_workers": 11},
        {"data__path": "/moved/train.jsonl"},
        {"trainer__total_steps": 99},
        {"checkpoint__keep": 99},
        {"model__lora__rank": 99},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_alter_it_may_change(tmp_path, changes, warnings):
    refuse(tmp_path, changes)
    assert warnings() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__lr": 3.0}, "optimizer.lr was 0.0001 until step-3, and is 3.0 from there on"),
        ({"scheduler__name": "wsd"}, "scheduler.name was cosine until step-3, and is wsd from there on"),
        ({"parallelism__reduce_dtype": "bfloat16"}, "parallelism.reduce_dtype was float32 until step-3, and is bfloat16 from there on"),
    ],
)
def test_what_one_may_change_on_purpose_is_told(tmp_path, changes, words, warnings):
    """Or a line that is typed anew without its learning rate would go on with another one, and no one knew."""
    refuse(tmp_path, changes)
    assert warnings() == [f"checkpoint.resume: {words}"]


def test_a_checkpoint_that_does_not_say_with_which_learning_rate_it_was_made_is_continued(tmp_path, warnings):
    recorded = {key: value for key, value in trajectory(config_of(), "files").items() if not key.startswith("optimizer.")}
    checkpoint = make_checkpoint(tmp_path, 3, trajectory=recorded | {"optimizer.name": "adamw"})
    resume.refuse_other_trajectory(checkpoint, trajectory(config_of(), "files"), [])
    assert warnings() == []


@pytest.mark.parametrize("allowed", [["trainer.seed", "data.pack_max_length"], ["trainer", "data"], ["trainer", "data.pack_max_length"]])
def test_a_change_that_is_allowed_is_a_warning(tmp_path, allowed, warnings):
    seed = config_of().trainer.seed
    refuse(tmp_path, {"trainer__seed": 7, "data__pack_max_length": 17}, allowed=allowed)
    assert len(warnings()) == 2
    assert f"checkpoint.resume: trainer.seed was {seed} until step-3, and is 7 from there on" in warnings()


def test_what_is_not_allowed_is_refused_alone(tmp_path):
    with pytest.raises(RefusedError) as error:
        refuse(tmp_path, {"trainer__seed": 7, "data__pack_max_length": 17}, allowed=["data", "trainer.see"])
    assert "trainer.seed" in str(error.value)
    assert "pack_max_length" not in str(error.value)
