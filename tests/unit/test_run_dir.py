"""Who may write in a run directory, and that what is written there can be read back."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import REPOSITORY

from xtuner_hydra import run_dir
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig
from xtuner_hydra.errors import RefusedError

SHAPE = dict(
    vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8
)
CONFIG = Config(model=ModelConfig(**SHAPE), data=DataConfig(path=["a", "b"]))
OVERRIDES = ["data.path=[a,b]", 'tracking.wandb.name="x: y"', "model.chat_template=null", "trainer.sample_prompts=[a\u2028b\u0085c]"]


def test_what_is_created_can_be_read_back(tmp_path):
    run_dir.create(tmp_path / "run", CONFIG, OVERRIDES, {"command": "x"})
    assert run_dir.read_config(tmp_path / "run") == CONFIG
    assert run_dir.read_overrides(tmp_path / "run") == OVERRIDES
    assert run_dir.read_status(tmp_path / "run")["state"] == "running"
    assert run_dir.holds_run(tmp_path / "run")


def test_a_taken_directory_is_refused_unless_resumed(tmp_path):
    run_dir.create(tmp_path, CONFIG, [], {})
    with pytest.raises(RefusedError, match=r"checkpoint\.resume=auto"):
        run_dir.refuse_unusable(tmp_path, resuming=False)
    run_dir.refuse_unusable(tmp_path, resuming=True)


def test_a_directory_whose_run_still_goes_on_is_refused_to_others(tmp_path):
    run = tmp_path / "run"
    run_dir.create(run, CONFIG, [], {})
    run_dir.refuse_unusable(run, resuming=True)  # by the process that runs it
    script = f"""
from pathlib import Path
from xtuner_hydra import run_dir
from xtuner_hydra.errors import RefusedError
run_dir.DYING_SECONDS = 0.1
try:
    run_dir.refuse_unusable(Path({str(run)!r}), resuming=True)
except RefusedError as error:
    print(error)
run_dir.refuse_unusable(Path({str(tmp_path / "copy")!r}), resuming=True)
"""
    shutil.copytree(run, tmp_path / "copy")
    other = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert f"{run}: this run is still running (process {os.getpid()})" in other.stdout, other.stderr
    assert other.returncode == 0, other.stderr  # the copy of a run that goes on is free
    run_dir.write_status(run, "interrupted")
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True).stdout == ""


def test_a_directory_is_used_by_one_command_at_a_time(tmp_path):
    run = tmp_path / "run"
    with run_dir.alone_in(run):
        with pytest.raises(RefusedError, match=f"hydra.run.dir={run}: another command is using this directory"), run_dir.alone_in(run):
            pass
        with run_dir.alone_in(tmp_path / "other"):
            pass
    with run_dir.alone_in(run):  # free again
        pass


def test_a_command_that_is_ending_is_waited_for(tmp_path):
    first = run_dir.alone_in(tmp_path)
    first.__enter__()
    threading.Timer(0.5, lambda: first.__exit__(None, None, None)).start()
    with run_dir.alone_in(tmp_path, patience=20):
        pass


def test_an_end_that_cannot_be_recorded_is_logged(tmp_path, caplog):
    """As on a full disk: the exit code still says how the run ended."""
    logging.getLogger("xtuner_hydra").propagate = True  # a run in this process would have turned it off
    run_dir.record_end(tmp_path / "gone", "failed", exit_code=1)
    assert "gone/status.json: No such file or directory; it does not say how the run ended" in caplog.text


def test_what_a_killed_run_has_left_running_is_waited_for(tmp_path):
    script = f"from pathlib import Path; from xtuner_hydra import run_dir as r; r.write_status(Path({str(tmp_path)!r}), 'running'); input()"
    dying = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdin=subprocess.PIPE)
    while not run_dir.read_status(tmp_path):
        time.sleep(0.05)
    released = threading.Event()

    def release():
        released.set()
        dying.communicate(b"\n")

    threading.Timer(0.5, release).start()
    run_dir.refuse_unusable(tmp_path, resuming=True)
    assert released.is_set()
    assert dying.wait() == 0


def test_an_empty_directory_or_one_to_be_made_is_free(tmp_path):
    run_dir.refuse_unusable(tmp_path, resuming=False)
    run_dir.refuse_unusable(tmp_path / "a" / "b", resuming=False)
    assert not (tmp_path / "a").exists()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match="is a file"):
        run_dir.refuse_unusable(tmp_path / "file" / "run", resuming=False)


@pytest.mark.parametrize("below", [".", "in/it"])
def test_a_directory_without_permission_is_refused(below):
    """In a process of its own, which gives up being root where it is."""
    with TemporaryDirectory() as open_to_all:
        shut = Path(open_to_all, "shut")
        (shut / "in").mkdir(parents=True)
        Path(open_to_all).chmod(0o755)
        script = f"""
import os, sys
from pathlib import Path
from xtuner_hydra import run_dir
from xtuner_hydra.errors import RefusedError
if os.geteuid() == 0:
    os.setgroups([])
    os.setuid(65534)
try:
    run_dir.refuse_unusable(Path({str(shut / below / "run")!r}), resuming=False)
except RefusedError as error:
    sys.exit(str(error))
"""
        shut.chmod(0o500 if below == "." else 0)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
        shut.chmod(0o700)
    assert f"{shut} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_status_is_json_whatever_the_metrics_were(tmp_path, value):
    run_dir.write_status(tmp_path, "completed", metrics={"train/loss": 0.1 + 0.2, "train/grad_norm": value})
    text = (tmp_path / "status.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"train/loss": 0.1 + 0.2, "train/grad_norm": None}


@pytest.mark.parametrize("text", ["", '{"state": "run'])
def test_a_status_that_cannot_be_read_is_an_empty_one(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert run_dir.read_status(tmp_path) == {}


def test_no_status_is_an_empty_one(tmp_path):
    assert run_dir.read_status(tmp_path) == {}
