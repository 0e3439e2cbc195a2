"""No file of a run holds a key, wherever the key comes in: the environment, the command line, the uncommitted changes of the repository."""

import json
import subprocess

import pytest
import wandb_file
from conftest import CommandLine

WANDB_KEY, HF_TOKEN, PASSWORD = "0a1b2c3d4e" * 4, "hf_" + "aBcDeFgHiJ" * 3, "correct horse battery"
SECRETS = (WANDB_KEY, HF_TOKEN, PASSWORD)


def holding(directory, *texts):
    """Names and contents below `directory` that hold one of `texts`, as text or in the JSON of a W&B file."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(text.encode() in path.read_bytes() or text in str(path) for text in texts)]


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    cli = CommandLine(tmp_path_factory.mktemp("secrets"))
    cli.environment |= {"WANDB_API_KEY": WANDB_KEY, "HF_TOKEN": HF_TOKEN, "DB_PASSWORD": PASSWORD, "WANDB_MODE": "offline"}
    settings = cli.directory / "settings.py"
    settings.write_text("before = 1\n")
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "settings.py"], ["commit", "-qm", "settings"]):
        subprocess.run(["git", *identity, *command], cwd=cli.directory, check=True)
    remote = f"https://{HF_TOKEN}:x-oauth-basic@example.org/repository.git"
    subprocess.run(["git", "remote", "add", "origin", remote], cwd=cli.directory, check=True)
    settings.write_text(f'key = "{WANDB_KEY}"\ntoken = "{HF_TOKEN}"\npassword = "{PASSWORD}"\n')
    return cli


def test_no_file_of_a_run_holds_a_key(cli):
    done = cli(
        *("debug=fast", "hydra.run.dir=run", f"hydra.job.name={WANDB_KEY}", f"tracking.wandb.name={HF_TOKEN}", "tracking.wandb.name=mine"),
        *("trainer.sample_prompts=[hello]", "trainer.eval_interval=1", "checkpoint.interval=-1", "checkpoint.hf_interval=-1"),
    )
    assert done.code == 0, done.text
    run = cli.directory / "run"
    assert not [secret for secret in SECRETS if secret in done.text]
    assert not holding(run, *SECRETS)
    environment = json.loads((run / "environment.json").read_text())
    assert "hydra.job.name=***" in environment["command"]
    assert '+token = "***"' in environment["git"]["diff"]
    assert "tracking.wandb.name=***" in (run / "overrides.yaml").read_text()
    record = wandb_file.read(run)
    assert record.config["overrides"]["tracking"]["wandb"]["name"] == "mine"
    assert not [secret for secret in SECRETS if secret in str(vars(record))]


@pytest.mark.parametrize("override", [f"tracking.wandb.tags=[{WANDB_KEY}]", f"data.path=/data/me:{HF_TOKEN}/x.jsonl"])
def test_a_key_in_the_config_is_refused_without_being_shown(cli, override):
    done = cli("debug=fast", "hydra.run.dir=refused", override)
    assert done.code == 2
    assert "holds a secret" in done.err
    assert override.partition("=")[0] in done.err
    assert not [secret for secret in SECRETS if secret in done.text]
    assert not (cli.directory / "refused").exists()


def test_a_sweep_whose_command_holds_a_key_is_refused(cli):
    done = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e-4", "hydra.sweep.dir=sweep", f"hydra.job.name={WANDB_KEY}")
    assert done.code == 2
    assert "hydra.job.name=***: holds a secret" in done.err
    assert not (cli.directory / "sweep").exists()


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "GOOGLE_CREDENTIALS"])
def test_a_config_cannot_fetch_a_secret_from_the_environment(cli, name):
    done = cli("debug=fast", f"tracking.wandb.name=${{oc.env:{name},none}}")
    assert done.code == 2
    assert f"${{oc.env:{name}}} would write a secret into the config" in done.err
    assert "Traceback" not in done.text


def test_other_variables_can_be_read(cli):
    cli.environment["MY_PROJECT"] = "kittens"
    done = cli("--cfg", "job", "--resolve", "tracking.wandb.project=${oc.env:MY_PROJECT}", "tracking.wandb.group=${oc.env:NOBODY,alone}")
    assert "project: kittens" in done.out
    assert "group: alone" in done.out
