"""rerun composes the run again: its values, changed by overrides under the command line's own strictness."""

import json
from pathlib import Path

import pytest
from run_dirs import describe, make_run

from xtuner_hydra.app import App
from xtuner_hydra.config.strict import changed, to_yaml
from xtuner_hydra.errors import DataError, RefusedError
from xtuner_hydra.results.run import load_run
from xtuner_hydra.run_dir import write_status
from xtuner_hydra.tools import rerun


@pytest.fixture
def run(tmp_path):
    return load_run(make_run(tmp_path / "10-20-30-123456_mine", lr=2e-4, overrides=["optimizer.lr=2e-4", "model.num_hidden_layers=1"]))


def again(run, *overrides):
    with App(list(overrides)) as app:
        return rerun.again(app, run)


def edit(run, change):
    """`run` with another config."""
    config = run.config
    change(config)
    (run.directory / "config.yaml").write_text(to_yaml(config))
    return load_run(run.directory)


def test_without_overrides_the_config_is_the_runs(run):
    composition = again(run)
    assert composition.config == run.config
    assert composition.overrides == run.overrides
    assert composition.rerun_of == run.directory


def test_the_directory_is_todays_with_the_runs_name_and_what_is_new(run):
    directory = again(run, "optimizer.weight_decay=0.5", "scheduler=constant").run_dir
    assert directory.parents[1] == Path("outputs").resolve()
    assert directory.name.partition("_")[2] == "mine-constant-weight_decay0.5"
    assert again(run, "hydra.run.dir=there").run_dir == Path("there").resolve()


def test_single_values_change_alone_and_with_their_type(run):
    composition = again(run, "optimizer.lr=1", "data.path=[a, b]", "++tracking.wandb.tags=[x]")
    assert changed(composition.config, run.config) == {
        "data.path": ("/data/train.jsonl", ["a", "b"]),
        "optimizer.lr": (2e-4, 1.0),
        "tracking.wandb.tags": ([], ["x"]),
    }
    assert isinstance(composition.config.optimizer.lr, float)


def test_a_group_is_replaced_whole_and_a_value_wins_over_it(run):
    run = edit(run, lambda config: setattr(config.optimizer, "weight_decay", 0.7))
    composition = again(run, "optimizer.eps=1e-7", "optimizer=adamw")
    assert changed(composition.config, run.config) == {
        "optimizer.lr": (2e-4, 6e-5),
        "optimizer.weight_decay": (0.7, 0.01),
        "optimizer.eps": (1e-8, 1e-7),
    }
    assert composition.overrides == ["model.num_hidden_layers=1", "optimizer.eps=1e-7", "optimizer=adamw"]


def test_an_option_sets_what_its_file_sets_in_other_groups_too(run):
    composition = again(run, "parallelism=fsdp", "debug=fast")
    assert composition.config.trainer.global_batch_size is None
    assert composition.config.model.hidden_size == 64
    assert composition.config.optimizer.lr == 2e-4


def test_options_win_over_each_other_as_in_a_composition(run):
    """A debug option over a model, parallelism over trainer, whatever their order on the command line."""
    overrides = ["debug=fast", "model=qwen3_tiny", "parallelism=fsdp", "trainer=default", "data.path=x"]
    config = again(run, *overrides).config
    with App(overrides) as app:
        composed = app.compose(overrides).config
    assert (config.model, config.trainer, config.parallelism) == (composed.model, composed.trainer, composed.parallelism)
    assert (config.model.hidden_size, config.trainer.global_batch_size) == (64, None)


def test_an_experiment_that_chooses_another_group_s_option_replaces_that_too(run, tmp_path):
    composition = again(run, "experiment=smollm2_sft", "model=smollm2_135m", "optimizer.eps=1e-7")
    config = composition.config
    assert (config.optimizer.lr, config.optimizer.eps, config.scheduler.warmup_ratio) == (1e-4, 1e-7, 0.1)
    assert config.model.hidden_size == 576  # the command line's own choice wins
    assert composition.choices == {"model": "smollm2_135m", "experiment": "smollm2_sft"}
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\ndefaults:\n  - override /model: smollm2_135m\n  - override /scheduler: constant\nmodel:\n  num_hidden_layers: 2\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(mine)
    config = again(run, "--config-dir", str(tmp_path / "conf"), "experiment=mine").config
    assert (config.model.hidden_size, config.model.num_hidden_layers, config.scheduler.name, config.optimizer.lr) == (
        576,
        2,
        "constant",
        2e-4,
    )
    with pytest.raises(RefusedError, match=r"model=hf needs model\.pretrained=DIR"):
        again(run, "experiment=smollm2_sft")


def test_options_of_ones_own_are_found(run, tmp_path):
    (tmp_path / "conf" / "scheduler").mkdir(parents=True)
    (tmp_path / "conf" / "scheduler" / "mine.yaml").write_text("name: linear\nlr_min: ${optimizer.lr}\n")
    scheduler = again(run, "--config-dir", str(tmp_path / "conf"), "scheduler=mine").config.scheduler
    assert (scheduler.name, scheduler.lr_min, scheduler.warmup_ratio) == ("linear", 2e-4, 0.03)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", r"optimizer\.lrr: there is no such key .*Did you mean optimizer\.lr\?"),
        ("+optimizer.lrr=1", "there is no such key"),
        ("optimizer.lr=fast", r"optimizer\.lr: must be a number, got 'fast' \(set in the command line: optimizer\.lr=fast\)"),
        ("optimizer.lr=-1", r"optimizer\.lr=-1\.0: must be .* \(set in the command line"),
        ("optimizer=adam", r"optimizer=adam: there is no such option\. Did you mean adamw\?"),
        ("optimzer=adamw", "Did you mean optimizer"),
        ("experiment=null", "leave it out"),
        ("~optimizer.lr", "nothing can be removed"),
        ("optimizer.lr=1,2", "several values"),
        ("sweep=seeds", "a rerun is a single run"),
        ("sweep.trials=3", "a rerun is a single run"),
        ("model=hf", r"model=hf needs model\.pretrained=DIR"),
    ],
)
def test_overrides_are_checked_as_on_the_command_line(run, override, message):
    with pytest.raises(RefusedError, match=message):
        again(run, override)


def test_a_jobs_rerun_is_a_single_run_from_the_start(tmp_path):
    run = load_run(make_run(tmp_path / "sweep" / "3_lr0.0002"))

    def as_in_a_sweep(config):
        config.sweep.search, config.sweep.params, config.checkpoint.resume = "random", {"optimizer.lr": "1,2"}, "auto"
        config.tracking.wandb.group, config.tracking.wandb.name = "sweep", "by hand"

    config = again(edit(run, as_in_a_sweep)).config
    assert (config.sweep.search, config.sweep.params, config.checkpoint.resume) == ("grid", {}, "never")
    assert (config.tracking.wandb.group, config.tracking.wandb.name) == (None, "by hand")
    config = again(edit(run, lambda config: setattr(config.tracking.wandb, "group", "by hand"))).config
    assert config.tracking.wandb.group == "by hand"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "-m", "optimizer.lr=1,2"], "repeats one run"),
        (["RUN", "--cfg", "job"], r"RUN/config\.yaml"),
        ([], "name the directory of a run"),
        (["optimizer.lr=1"], "name the directory of a run"),
        (["nowhere"], "nowhere: not a run directory"),
    ],
)
def test_what_is_no_rerun_is_refused(run, argv, message):
    with pytest.raises(RefusedError, match=message):
        rerun.main([str(run.directory) if word == "RUN" else word for word in argv])


def test_data_that_has_changed_is_refused_unless_it_is_given(run):
    def check(files, given=()):
        rerun.refuse_other_data(run, {"train": describe(files), "eval": None}, run.config, set(given))

    check([("/data/a", "hash")])
    check([("/moved/a", "hash")])
    check([("/data/a", "other")], given=["data.path"])
    with pytest.raises(DataError, match=r"data\.path: no longer what .* /data/a has changed; 10 samples then, 10 now"):
        check([("/data/a", "other")])
    with pytest.raises(DataError, match=r"/data/b is new"):
        check([("/data/a", "hash"), ("/data/b", "more")])


def test_what_cannot_be_the_same_is_told_a_line_each(run, monkeypatch):
    now = json.loads((run.directory / "environment.json").read_text())
    monkeypatch.setattr(rerun, "environment", lambda argv: now)
    data = {"train": describe([("/data/a", "hash")]), "eval": None}
    assert list(rerun.differences(run, data, 1)) == []
    now["versions"]["torch"] = "2.14.0"
    now["hardware"] = {"cpu": "another", "gpus": ["a GPU"]}
    now["git"] = {"commit": "d" * 40, "dirty": False, "diff": ""}
    data["train"]["fingerprint"] = "other"
    assert list(rerun.differences(run, data, 2)) == [
        "torch 2.13.0 then, 2.14.0 now",
        "commit cccccccccccc then, commit dddddddddddd now",
        "a CPU then, another now",
        "no GPU then, a GPU now",
        "1 ranks then, 2 now",
        "the training data is read differently: by another format, tokenizer or version of these",
    ]
    now.update(json.loads((run.directory / "environment.json").read_text()))
    now["git"]["diff"] = "+x"
    data["train"]["fingerprint"] = "hash"
    (line,) = rerun.differences(run, data, 1)
    assert "uncommitted changes" in line


def test_a_run_that_failed_can_be_repeated(run):
    write_status(run.directory, "failed")
    assert again(load_run(run.directory)).config == run.config
