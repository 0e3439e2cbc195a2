"""A Hub id is taken from the Hugging Face cache; without it and without a network there is a sentence, not a traceback."""

import socket

import huggingface_hub.constants
import pytest
from parity import make_checkpoint, ours, same_logits

from xtuner_hydra.app import App
from xtuner_hydra.errors import ConfigError
from xtuner_hydra.model.hub import local_directory

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def cached(cache):
    """ORG/TINY as a download leaves it in the cache."""
    repository = cache / "models--ORG--TINY"
    make_checkpoint(repository / "snapshots" / COMMIT, "qwen2")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("config_only", [False, True])
def test_an_id_is_a_directory_of_the_cache(cached, config_only):
    directory = local_directory("ORG/TINY", config_only=config_only)
    assert directory.resolve() == cached.resolve()
    same_logits(cached, ours(directory))


def test_a_directory_is_itself_even_if_it_looks_like_an_id(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ORG" / "TINY").mkdir(parents=True)
    assert local_directory("ORG/TINY").resolve() == tmp_path / "ORG" / "TINY"


def test_the_config_of_an_id_fills_the_model_group(cached):
    overrides = ["model=hf", "model.pretrained=ORG/TINY", "model.tokenizer=byte"]
    with App(overrides) as app:
        model = app.compose(overrides).config.model
    assert (model.family, model.hidden_size, model.head_dim, model.qkv_bias) == ("qwen2", 48, 12, True)


def test_what_is_not_in_the_cache_is_refused_offline(cache):
    with pytest.raises(ConfigError, match="neither a directory here nor in the Hugging Face cache"):
        local_directory("ORG/ELSE")


@pytest.mark.timeout(60)
def test_what_cannot_be_reached_is_refused_too(cache, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ConfigError, match=r"model\.pretrained=ORG/ELSE"):
        local_directory("ORG/ELSE")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such/directory"])
def test_what_is_no_id_stays_a_path(cache, name):
    assert str(local_directory(name)) == name
