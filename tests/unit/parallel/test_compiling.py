import pytest

from xtuner_hydra.config.schema import Config, ModelConfig, ParallelismConfig
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.parallel import compiling
from xtuner_hydra.parallel.compiling import choose_compile

SHAPE = dict(vocab_size=151936, hidden_size=512, intermediate_size=12288, num_hidden_layers=3, num_attention_heads=32)
SHAPE |= dict(num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False)


def config(wish="auto"):
    made = Config(model=ModelConfig(**SHAPE))
    made.parallelism.compile = wish
    return made


def chosen(wish="auto", tokens=1000, device="cpu", world_size=1):
    return choose_compile(config(wish), device, world_size, tokens)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setattr(compiling, "_lacking", lambda: None)


def test_auto_compiles_only_a_run_that_is_long_enough():
    assert not chosen(tokens=70_000).enabled
    assert chosen(tokens=70_000_000).enabled


def test_it_says_what_it_chose_and_why():
    assert "would save about" in chosen(tokens=70_000).why
    assert chosen(tokens=70_000).why.startswith("off")
    assert chosen(tokens=70_000_000).why.startswith("on for norms")
    assert chosen("false", 70_000_000).why == "off (parallelism.compile=false)"


def test_true_and_false_do_not_ask_how_long():
    assert chosen("true", 1).enabled
    assert not chosen("false", 10**12).enabled


def test_devices_share_the_tokens_and_ranks_on_a_cpu_the_cores():
    enough = next(10**power for power in range(20) if chosen(tokens=10**power, device="cuda").enabled)
    assert not chosen(tokens=enough, device="cuda", world_size=100).enabled
    assert chosen(tokens=70_000_000, world_size=2).why == chosen(tokens=70_000_000).why


def test_without_a_compiler_auto_goes_on_and_true_is_refused(monkeypatch):
    monkeypatch.setattr(compiling, "_lacking", lambda: "C++ compiler")
    assert chosen(tokens=70_000_000).why == "off (there is no C++ compiler)"
    assert chosen(tokens=70_000_000, device="cuda").enabled
    with pytest.raises(ConfigError, match=r"parallelism\.compile=true: there is no C\+\+ compiler; install it"):
        chosen("true")


def test_a_compiler_and_pythons_headers_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clang++").touch(mode=0o755)  # which inductor does not look for
    assert compiling._lacking() == "C++ compiler g++ (CXX names another)"
    (tmp_path / "g++").touch(mode=0o755)
    assert compiling._lacking() in (None, str(compiling.Path(compiling.sysconfig.get_path("include")) / "Python.h"))
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    assert compiling._lacking() == str(tmp_path / "Python.h")
    monkeypatch.setenv("CXX", "icpx")
    assert compiling._lacking() == "C++ compiler icpx (CXX names another)"


@pytest.mark.parametrize("typed", [True, "true", "True"])
def test_what_yaml_makes_of_true(typed):
    assert ParallelismConfig(compile=str(typed)).compile == "true"
    with pytest.raises(ConfigError, match=r"parallelism\.compile=sometimes: must be one of auto, true, false"):
        ParallelismConfig(compile="sometimes")
