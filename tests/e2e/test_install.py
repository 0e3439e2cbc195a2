"""From a checkout, an editable install and a wheel: conf/ and the example data come along, from any directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, CommandLine, read_status

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]
JOB = ("debug=fast", "tracking=none", "checkpoint=none", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files under version control (and new ones), away from the checkout, which building would litter."""
    copy = tmp_path_factory.mktemp("source")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, copy / name)
    return copy


def command_line(directory, *path):
    """A command line that sees the package in `path` alone."""
    cli = CommandLine(directory)
    cli.environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return cli


def where(cli):
    command = [sys.executable, "-c", "import xtuner_hydra; print(xtuner_hydra.__file__)"]
    return Path(subprocess.run(command, cwd=cli.directory, env=cli.environment, check=True, capture_output=True, text=True).stdout.strip())


def test_a_wheel_works_from_any_directory(source, tmp_path):
    subprocess.run([*PIP, "wheel", *OFFLINE, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    examples = ("examples/openai_sft.jsonl", "examples/openai_sft_heldout.jsonl")
    for name in ("conf/config.yaml", "conf/model/qwen3_tiny.yaml", "data/qwen3.jinja", *examples):
        assert f"xtuner_hydra/{name}" in names
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--ignore-installed", "--target", site, wheel], check=True)
    (tmp_path / "elsewhere").mkdir()
    cli = command_line(tmp_path / "elsewhere", site)
    assert where(cli).is_relative_to(site)
    done = cli.fresh(*JOB)
    assert done.code == 0, done.text
    assert read_status(cli.directory / "run")["state"] == "completed"
    script = subprocess.run(
        [site / "bin" / "xtuner-hydra", "plan", "debug=fast"], cwd=tmp_path, env=cli.environment, capture_output=True, text=True
    )
    assert script.returncode == 0, script.stderr
    assert "parameters" in script.stdout


def test_an_editable_install_works_from_any_directory(source, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    # --ignore-installed: or pip would uninstall the package from the environment that runs the tests
    install = [*PIP, "install", *OFFLINE, "--ignore-installed", "--prefix", tmp_path / "venv", "--editable", source]
    subprocess.run(install, check=True)
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # found there, but no .pth file of theirs is read
    (tmp_path / "elsewhere").mkdir()
    environment = command_line(tmp_path / "elsewhere").environment
    command = [tmp_path / "venv" / "bin" / "python", "-m", "xtuner_hydra", *JOB]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{source}/xtuner_hydra/examples/openai_sft.jsonl" in done.stdout


def test_a_checkout_works_without_installing(tmp_path):
    done = command_line(tmp_path, REPOSITORY)(*JOB)
    assert done.code == 0, done.text


def test_help_works_from_the_root_of_a_checkout(source, tmp_path):
    cli = command_line(tmp_path, source)
    cli.directory = source
    assert where(cli).is_relative_to(source)
    done = cli.fresh("--help")
    assert (done.code, "GROUP=OPTION" in done.out) == (0, True), done.text
