"""environment.json tells what a run was made with, and no secrets."""

import json
import subprocess

import torch

from xtuner_hydra.tracking.environment import environment


def git(*command):
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    return subprocess.run(["git", *identity, *command], check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_diff_are_of_the_repository_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("before\n")
    git("init", "-q")
    git("add", "notes")
    git("commit", "-qm", "notes")
    (tmp_path / "notes").write_text("after\n")
    found = environment(["prog", "a b"])
    assert found["git"]["commit"] == git("rev-parse", "HEAD")
    assert found["git"]["dirty"]
    assert "+after" in found["git"]["diff"]
    assert found["command"] == "prog 'a b'"


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(["prog"])["git"] is None


def test_the_command_is_one_that_can_be_typed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert (
        environment(["/site/xtuner_hydra/__main__.py", "-m", "optimizer.lr=1,2"])["command"] == "python -m xtuner_hydra -m optimizer.lr=1,2"
    )
    assert environment(["/venv/bin/xtuner-hydra", "debug=fast"])["command"] == "xtuner-hydra debug=fast"


def test_versions_are_told_and_secrets_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # not in this repository: the value below is part of its diff while this file is edited
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_OWN_VARIABLE"):
        monkeypatch.setenv(name, "s3cr3t-value")
    text = json.dumps(environment(["prog"]))
    assert json.loads(text)["versions"]["torch"] == torch.__version__
    assert "s3cr3t-value" not in text
