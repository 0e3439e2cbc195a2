"""Shared by all tests: the real command line, in a directory, token cache and W&B of its own."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before torch reads it. Two workers of two threads each on two cores wait for each other in every small operation: a test takes six times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import smollm2 as smollm2_model
from forks import command, tests_environment

REPOSITORY = Path(__file__).parents[1]
QUIET = ("tracking=none", "checkpoint=none", "data.eval_path=null")  # for tests that look at something else


@dataclass
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self):
        return self.out + self.err


class CommandLine:
    """`python -m xtuner_hydra` in `directory`: in a fork (forks.py), or as a shell starts it, `fresh`."""

    def __init__(self, directory):
        self.directory = directory
        self.environment = tests_environment(directory)

    def __call__(self, *args, timeout=180):
        with tempfile.TemporaryDirectory() as outside:  # the directory holds what the command makes, and no more
            out, err = Path(outside) / "out", Path(outside) / "err"
            fork = command(self.directory, *args, name=out, errors=err, **self.environment)
            return Finished(fork.wait(timeout), out.read_text(), err.read_text())

    def fresh(self, *args, module="xtuner_hydra", timeout=180):
        done = subprocess.run(
            self._command(args, module), cwd=self.directory, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def torchrun(self, ranks, *args, timeout=180):
        return self.fresh("--nproc-per-node", str(ranks), "-m", "xtuner_hydra", *args, module="torch.distributed.run", timeout=timeout)

    def start(self, *args):
        """A fork to send signals to; its output goes to a file `output` in the directory."""
        return command(self.directory, *args, **self.environment)

    def start_fresh(self, *args, module="xtuner_hydra"):
        """The same as a shell starts it."""
        with (self.directory / "output").open("w") as output:
            return subprocess.Popen(
                self._command(args, module), cwd=self.directory, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def _command(self, args, module):
        return [sys.executable, "-m", module, *map(str, args)]


@pytest.fixture
def cli(tmp_path):
    return CommandLine(tmp_path)


@pytest.fixture(scope="session")
def smollm2():
    """The directory of a real model, SmolLM2-135M-Instruct."""
    return smollm2_model.make()


def read_rows(run_dir):
    """metrics.jsonl, parsed strictly: NaN and Infinity are no JSON."""

    def refuse(word):
        raise ValueError(f"not JSON: {word}")

    return [json.loads(line, parse_constant=refuse) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def read_status(run_dir):
    return json.loads((Path(run_dir) / "status.json").read_text())


def wait_for(condition, process=None, seconds=120):
    """Wait until `condition()` is true; fails when the process ends before or time runs out."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, "the process ended early"
        time.sleep(0.05)


def stop(process, number=signal.SIGINT, seconds=60):
    """Signal a process and wait for its exit code."""
    process.send_signal(number)
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def warnings(caplog):
    """The warnings that were logged so far, when it is called."""
    logging.getLogger("xtuner_hydra").propagate = True  # a run in this process would have turned it off
    caplog.set_level(logging.WARNING, "xtuner_hydra")
    return lambda: [record.message for record in caplog.records]
