"""Secrets are hidden, terminals are not steered."""

import logging

import pytest

from xtuner_hydra import run_dir
from xtuner_hydra.safe_text import LineFormatter, is_secret, printable, redact, redacted


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DB_PASSWORD", "MYSQL_PWD", "DB_PASS"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "openai_api_key", "GITHUBTOKEN", "SECRET_1", "TOKENS"),
    ],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["HOME", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PASSENGER", "COMPASS", "SSH_AUTH_SOCK"])
def test_names_of_other_things(name):
    assert not is_secret(name)


def test_values_of_secret_variables_are_hidden_the_longest_first(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "swordfish")
    monkeypatch.setenv("MY_PASSWORD", "swordfish-and-chips")
    monkeypatch.setenv("MY_PRIVATE_KEY", "-----BEGIN-----\nabcdefghijklmnop\n-----END-----")
    monkeypatch.setenv("FISH", "red-herring")
    assert redact("swordfish-and-chips, swordfish, red-herring") == "***, ***, red-herring"
    assert redact("+-----BEGIN-----\n+abcdefghijklmnop\n") == "+***\n+***\n"
    assert redacted({"a": ["swordfish", 1, None], "swordfish": "b"}) == {"a": ["***", 1, None], "***": "b"}


def test_short_values_and_paths_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("USE_TOKEN", "true")
    monkeypatch.setenv("SSH_KEY_PATH", str(tmp_path))
    assert redact(f"true {tmp_path}/data.jsonl") == f"true {tmp_path}/data.jsonl"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("token hf_" + "a1B2c" * 7, "token ***"),
        ("sk-proj-" + "a1B2c" * 7, "***"),
        ("WANDB_API_KEY=" + "0a" * 20, "WANDB_API_KEY=***"),
        ('"api_key": "' + "0a" * 20 + '"', '"api_key": "***"'),
        ("https://me:pa55word@example.org/x", "https://***@example.org/x"),
        ("commit " + "0a" * 20, "commit " + "0a" * 20),
        (
            "see hf_transfer and data/sk-learn-classification-of-many-things-2",
            "see hf_transfer and data/sk-learn-classification-of-many-things-2",
        ),
    ],
)
def test_what_looks_like_a_key_is_hidden(text, hidden):
    assert redact(text) == hidden


def test_control_characters_are_written_out():
    assert printable("a\x1b[2Jb\x07\r\x9b31m\x7f\n\tü") == "a\\x1b[2Jb\\x07\\r\\x9b31m\\x7f\n\tü"


def test_a_log_line_holds_no_secret_not_even_in_its_traceback(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "swordfish")
    try:
        raise OSError("no entry for swordfish \x1b]0;title\x07")
    except OSError as error:
        record = logging.LogRecord("a", 40, "file", 1, "failed with %s", ("swordfish",), (OSError, error, error.__traceback__))
    line = LineFormatter("%(message)s").format(record)
    assert "failed with ***" in line
    assert "no entry for ***" in line
    assert "swordfish" not in line.replace('raise OSError("no entry for ***', "")
    assert "\x1b" not in line


def test_the_error_in_status_json_holds_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "swordfish")
    run_dir.write_status(tmp_path, "failed", error="401 for swordfish", step=3)
    assert "swordfish" not in (tmp_path / "status.json").read_text()
    assert run_dir.read_status(tmp_path)["error"] == "401 for ***"
