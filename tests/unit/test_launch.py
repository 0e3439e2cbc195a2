"""What launch puts into config.yaml and changed.json, so that a run can be repeated from anywhere and reports know what was chosen."""

import pytest
from run_dirs import make_config

from xtuner_hydra import launch
from xtuner_hydra.app import App
from xtuner_hydra.config.schema import Config
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.parallel import compiling


@pytest.mark.parametrize(
    ("path", "resolved"),
    [
        ("chats.jsonl", "HERE/chats.jsonl"),
        ("../data", "ABOVE/data"),
        ("chats/**/*.jsonl", "HERE/chats/**/*.jsonl"),
        (["a.jsonl", "/b.jsonl", "~/c"], ["HERE/a.jsonl", "/b.jsonl", "HOME/c"]),
    ],
)
def test_data_is_named_absolutely(tmp_path, monkeypatch, path, resolved):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = make_config(path=path)
    config.data.eval_path, config.data.cache_dir = path, "cache"
    launch.resolve(config, 1)
    for word, value in (("HERE", tmp_path), ("ABOVE", tmp_path.parent), ("HOME", "/home/me")):
        resolved = [one.replace(word, str(value)) for one in resolved] if isinstance(resolved, list) else resolved.replace(word, str(value))
    assert config.data.path == config.data.eval_path == resolved
    assert config.data.cache_dir == f"{tmp_path}/cache"


def test_what_is_resolved_stays_as_it_is():
    config = make_config()
    launch.resolve(config, 2)
    before = config.data.path, config.data.eval_path, config.parallelism.nproc_per_node
    launch.resolve(config, 2)
    assert (config.data.path, config.data.eval_path, config.parallelism.nproc_per_node) == before == ("/data/train.jsonl", None, 2)


def test_ranks_of_an_outer_torchrun_are_recorded(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    config = make_config()
    launch.resolve(config, 8)
    assert config.parallelism.nproc_per_node == 4


@pytest.fixture
def changes(tmp_path, monkeypatch):
    """changed.json of a command line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def of(*argv):
        with App(argv) as app:
            return launch.changed_here(launch.prepare(app.compose(app.overrides), progress=False))

    return of


def test_nothing_has_changed_without_overrides(changes):
    assert changes() == {}


def test_what_the_machine_decides_is_no_change(changes, monkeypatch):
    assert changes("trainer.device=cpu") == {"trainer.device": ("auto", "cpu")}
    monkeypatch.setattr(launch, "param_dtype", lambda name, device: "float32" if name == "auto" else name)
    assert changes("parallelism.param_dtype=float32") == {}
    assert changes("parallelism.param_dtype=bfloat16") == {"parallelism.param_dtype": ("float32", "bfloat16")}


def test_what_was_set_to_its_default_is_no_change(changes):
    assert changes("optimizer.lr=6e-5", "optimizer.eps=2e-8") == {"optimizer.eps": (1e-8, 2e-8)}


def test_a_config_of_ones_own_that_leaves_values_open_is_compared_with_the_schema(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults:\n  - config\n  - override model: hf\n  - _self_\n")
    with App(["--config-dir", str(tmp_path), "--config-name", "mine", "model=qwen3_tiny"]) as app:
        assert app.compose(app.overrides).defaults() == Config()


def test_compiling_without_a_compiler_is_refused_before_a_run_directory_is_made(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_lacking", lambda: "C++ compiler")
    changes("debug=fast", f"hydra.run.dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError, match=r"parallelism\.compile=true: there is no C\+\+ compiler"):
        changes("debug=fast", "parallelism.compile=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
