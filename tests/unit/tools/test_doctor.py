"""doctor on this machine, and on machines with drivers and packages that a stand-in makes up."""

import os
import subprocess
import sys

import pytest

from xtuner_hydra.tools import doctor


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name first in PATH."""

    def install(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!{sys.executable}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


def test_the_command_says_whether_this_machine_can_train(cli):
    done = cli("doctor")
    assert (done.code, done.out.splitlines()[-1]) == (0, "ready to train")
    for name in ("Python", "packages", "device", "driver", "ranks", "bf16", "memory", "disk", "W&B", "optional"):
        assert name in done.out


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("550.127.07", "missing"),
        ("550.127.08", "missing"),
        ("550.127.09", "ok"),
        ("550.54.15", "missing"),
        ("560.28.03", "ok"),
        ("1000.1", "ok"),
        ("99.999.99", "missing"),
    ],
)
def test_the_driver_must_be_newer_than_xtuners(nvidia_smi, version, state):
    nvidia_smi(f"print({version!r})")
    check = doctor.driver()
    assert check.state == state
    assert version in check.text
    assert ("550.127.08" in check.text) == (state == "missing" or version == "550.127.08")


@pytest.mark.parametrize(
    "script", ["raise SystemExit('no devices were found')", "pass", "print('N/A')", "print('Failed to initialize NVML')"]
)
def test_a_driver_that_does_not_answer_is_missing(nvidia_smi, script):
    nvidia_smi(script)
    check = doctor.driver()
    assert check.state == "missing"
    assert "nvidia-smi does not answer" in check.text


def test_a_driver_that_hangs_is_missing(nvidia_smi, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, timeout, **kwargs: run(*args, timeout=timeout / 200, **kwargs))
    nvidia_smi("import time; time.sleep(20)")
    check = doctor.driver()
    assert (check.state, "timed out" in check.text) == ("missing", True)


def test_a_program_that_cannot_be_run_is_missing(nvidia_smi, tmp_path):
    nvidia_smi("")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF of another machine")
    assert doctor.driver().state == "missing"


def test_an_old_driver_fails_the_command(cli, nvidia_smi):
    nvidia_smi("print('550.127.08')")
    cli.environment["PATH"] = os.environ["PATH"]
    done = cli("doctor")
    assert (done.code, done.out.splitlines()[-1]) == (1, "something that training needs is missing")
    assert "it must be newer than 550.127.08" in done.out


def test_a_package_that_is_too_old_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "safetensors" else "1000")
    check = doctor.packages()
    assert check.state == "missing"
    assert "safetensors>=0.5 (found none)" in check.text
    assert "pip install" in check.text


def test_it_takes_no_arguments(cli):
    assert cli("doctor", "now").code == 2
