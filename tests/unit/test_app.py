"""Wrong command lines are refused with the full key, where it was set, and what was probably meant."""

import pytest

from xtuner_hydra.app import App
from xtuner_hydra.config import elsewhere
from xtuner_hydra.config.strict import from_yaml, known_keys, to_yaml
from xtuner_hydra.errors import RefusedError


def refusal(*argv):
    with pytest.raises(RefusedError) as caught, App(argv) as app:
        app.compose(app.overrides)
    return str(caught.value)


@pytest.mark.parametrize(("written", "number"), [("1e6", 1_000_000), ("3.0", 3), ("7", 7)])
def test_a_whole_number_may_be_written_as_a_float(written, number):
    with App([f"trainer.total_tokens={written}"]) as app:
        total = app.compose(app.overrides).config.trainer.total_tokens
    assert (total, type(total)) == (number, int)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_unknown_key_is_refused_with_the_key_that_was_meant(prefix):
    assert "Did you mean optimizer.lr?" in refusal(f"{prefix}optimizer.lrr=1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr=1e-4", "Did you mean optimizer.lr?"),
        ("modle=qwen3_tiny", "Did you mean model?"),
        ("model=qwen_tiny", "Did you mean qwen3_tiny"),
        ("model=null", "Options of model"),
        ("data.nothing_like_it=1", "data has path, format"),
        ("optimizer.lr=fast", "must be a number, got 'fast' (set in the command line: optimizer.lr=fast)"),
        ("trainer.seed=null", "trainer.seed: must be a whole number, got null"),
        ("model.vocab_size=${oc.env:NOPE}", "Environment variable 'NOPE' not found (set in the command line"),
        ("optimizer.lr=[1e-4", "optimizer.lr=[1e-4: cannot be read (no viable alternative at input '[1e-4')"),
        ("a.jsonl", "a.jsonl: cannot be read (missing EQUAL at '<EOF>')"),
        ("trainer.total_steps=1.5", "must be a whole number or null, got 1.5"),
        ("optimizer.lr=-1", "0 or above"),
        ("optimizer.lr=nan", "0 or above"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("scheduler.name=cosin", "cosine, linear, constant"),
        ("trainer.device=tpu", "cpu"),
        ("trainer.log_interval=0", "at least 1"),
        ("checkpoint.interval=0", "-1 (at the end only)"),
        ("data.path=${nowhere}", "nowhere"),
        ("~optimizer.lr", "nothing can be removed"),
        ("optimizer.lr=1,2", "add -m to train each of them, or write optimizer.lr=[...] for a list"),
        ("debug=null", "leave it out. Options of debug: fast,"),
        ("hydra.run.dirr=x", "there is no such key. Did you mean hydra.run.dir"),
        ("optimizer.lr", "KEY=VALUE"),
        ("data.path=~/x.jsonl", "Quote the value, and the quotes for the shell: 'data.path=\"~/x.jsonl\"'"),
        ("data.path=run=1/x.jsonl", "'data.path=\"run=1/x.jsonl\"'"),
        ("learning_rate=1", "That is optimizer.lr here."),
        ("per-device-train-batch-size=1", "That is trainer.global_batch_size"),
        ("trainer.gradient_accumulation_steps=1", "That is trainer.global_batch_size, the packs of a step over all ranks here."),
        ("steps=10", "That is trainer.total_steps here."),
        ("packing=true", "That is data.pack_strategy here."),
        ("model=Qwen/Qwen3-0.6B", "Of your own, or from the Hub: model=hf model.pretrained=Qwen/Qwen3-0.6B."),
        ("data=./chats.jsonl", "Of your own: data=openai data.path=./chats.jsonl"),
        ("+model=qwen3_tiny", "an option is chosen without the +: model=qwen3_tiny"),
        ("hydra.run.dir=null", "is empty; name a directory"),
        ("hydra.run.dir=", "is empty; name a directory"),
        ("data.cache_dir=", "is empty; give a value, or null"),
        ("model.pretrained=", "is empty; give a value, or null"),
        ("model.tokenizer=", "is empty; give a value, or null"),
        ("data.path=s3://bucket/a.jsonl", "only local files are read"),
        ("hydra.sweeep.dir=x", "Did you mean hydra.sweep.dir"),
        ("data=openai", "data.path: needs a value"),
        ("model=hf", "model.pretrained"),
        ("tracking.wandb.mode=on", "online"),
        ("parallelism.tp=2", "there is no such key"),
        ("model.moe.num_experts=4", "set it whole"),
        ("model.moe.num_expert=4", "Did you mean model.moe.num_experts?"),
        ("model.moe={num_experts:4}", "model.moe.moe_intermediate_size: needs a value"),
        ("model.moe={num_experts:2,num_experts_per_tok:3,moe_intermediate_size:8}", "there are only 2 experts"),
        ("model.rope_scaling={rope_type:yarn,factor:4}", "linear, llama3"),
        ("model.rope_scaling={rope_type:llama3,factor:4}", "llama3 scaling needs a value"),
        ("model.rope_scaling={rope_type:linear,factor:4,low_freq_factor:1}", "a factor only"),
        ("model.rope_scaling={rope_type:linear,factor:0.5}", "at least 1"),
        ("model.rope_scaling.factr=4", "Did you mean model.rope_scaling.factor?"),
        ("model.sliding_window=0", "at least 1"),
        ("tracking.wandb=false", "tracking.wandb: must be a group of keys (enabled, mode,"),
        ("model.lora=5", "model.lora: must be a group of keys (rank, alpha,"),
        ("model.moe=[1]", "model.moe: must be a group of keys (num_experts,"),
        ("model.lora={rnk: 8}", "model.lora.rnk: there is no such key (set in the command line). Did you mean model.lora.rank?"),
        ("sweep.params={foo: 1}", "sweep.params.foo: there is no such key"),
        ("optimizer.betas=5", "optimizer.betas: must be a list, got 5 (set in the command line: optimizer.betas=5)"),
        ("optimizer.lr={a: 1}", "optimizer.lr: must be a number, got the group {'a': 1}"),
        ("trainer.freeze={a: 1}", "trainer.freeze: "),
    ],
)
def test_refusals_name_culprit_and_remedy(override, words):
    assert words in refusal(override)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ("[{pth: a}]", "data.sources[0].pth: there is no such key (set in the command line: data.sources=[{pth: a}]). Did you mean path?"),
        ("[{path: a},{format: text}]", "data.sources[1].path: needs a value"),
        ("[{path: a,sample_ratio: x}]", "data.sources[0].sample_ratio: must be a number, got 'x'"),
        ("[{path: a,sample_ratio: -1}]", "data.sources[0].sample_ratio=-1.0: must be a number above 0 (set in the command line"),
        ("[a]", "data.sources[0]: must be {path, format, sample_ratio}, got 'a'"),
        ("a", "data.sources: must be a list, got 'a'"),
        ("{path: a}", "data.sources: must be a list or null, got the group {'path': 'a'}"),
        ("[]", "data.path: needs a value"),
    ],
)
def test_a_mixture_is_as_strict_as_the_rest(sources, words):
    assert words in refusal("data=openai", f"data.sources={sources}")


def test_a_mixture_takes_the_place_of_a_path_that_was_left_open():
    overrides = ["data=openai", "data.sources=[{path: a},{path: [b,c],format: text,sample_ratio: 0.5}]"]
    with App(overrides) as app:
        config = app.compose(overrides).config
    assert config.data.path is None
    assert [(source.path, source.format, source.sample_ratio) for source in config.data.sources] == [
        ("a", None, 1.0),
        (["b", "c"], "text", 0.5),
    ]
    assert from_yaml(to_yaml(config)) == config


def test_what_others_call_a_key_is_a_key_of_ours():
    keys = known_keys()
    for name in elsewhere._NAMES:
        key = name.partition(",")[0]
        assert key in keys or key == "hydra.run.dir", key
    assert not {name for names in elsewhere._NAMES.values() for name in names} & {key.rpartition(".")[2] for key in keys}


def test_a_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with App(['hydra.run.dir="~/runs/mine"']) as app:
        assert app.compose(app.overrides).run_dir == tmp_path / "runs" / "mine"


@pytest.mark.parametrize("idle", ["hydra.launcher.slots=2", "hydra.sweep.dir=x", "hydra/launcher=submitit_local"])
def test_settings_of_a_sweep_are_refused_in_a_single_run(idle):
    with pytest.raises(RefusedError, match="is a setting of a sweep, but this is a single run; add -m"), App([idle]) as app:
        app.compose_run()


def test_a_runs_directory_is_refused_in_a_sweep():
    with pytest.raises(RefusedError, match=r"the directory of a sweep is hydra\.sweep\.dir"), App(["-m", "hydra.run.dir=x"]) as app:
        app.sweep_config()


@pytest.mark.parametrize("words", [["--lr", "1e-4"], ["--optimizer.lr=1e-4"]])
def test_a_setting_written_as_an_option_is_refused_in_a_sentence(words):
    with pytest.raises(RefusedError, match="Settings are written KEY=VALUE, without --"):
        App(words)


def test_an_experiment_that_forgets_its_package_is_told(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("trainer: {seed: 3}\n")
    assert "begin it with the line `# @package _global_`" in refusal("--config-dir", str(tmp_path), "experiment=mine")


def test_two_durations_are_refused():
    assert "trainer.epochs=1 is set too" in refusal("trainer.total_steps=3", "trainer.epochs=1")


def test_a_typo_in_a_users_own_file_names_the_file(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("name: adamw\nlr: 1e-3\nweigth_decay: 0.1\n")
    message = refusal("--config-dir", str(tmp_path), "optimizer=mine")
    assert "optimizer.weigth_decay" in message
    assert "optimizer/mine.yaml" in message
    assert "Did you mean optimizer.weight_decay?" in message


def test_yaml_that_cannot_be_read_is_named_with_its_line(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("lr: 1\nbetas: [")
    assert f"{tmp_path}/optimizer/mine.yaml:2: not YAML" in refusal("--config-dir", str(tmp_path), "optimizer=mine")


def test_values_of_ones_own_main_file_are_its(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\ntracking: 3\n")
    assert "(set in mine.yaml)" in refusal("--config-dir", str(tmp_path), "--config-name", "mine")


def test_a_users_own_option_is_found(tmp_path):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("name: adamw\nlr: 1e-3\n")
    argv = ["--config-dir", str(tmp_path), "optimizer=mine"]
    with App(argv) as app:
        assert app.compose(app.overrides).config.optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("typed", "named", "allowed"),
    [
        (["data.format=theirs.fmt:parse"], "theirs.fmt:parse", True),
        (["data.sources=[{path: a, format: fmt:parse}]"], "fmt:parse", True),
        (["data.format=theirs.fmt:parse"], "fmt:parse", False),
        (["data.format=theirs.fmt:parse"], "theirs.fmt:par", False),
        ([], "fmt:parse", False),
        (["--trust"], "fmt:parse", True),
    ],
)
def test_code_is_permitted_by_its_whole_name(typed, named, allowed):
    assert App(typed).may_run(named) == allowed
