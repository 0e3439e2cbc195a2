"""Commands and ranks in processes that start at once: forked from a server that has imported everything and started no thread.

A command is all that `python -m xtuner_hydra` runs, with its own arguments, environment, directory and output; only the interpreter's start
and the imports, 3 s of them, are not repeated, neither in the jobs of a sweep nor in the ranks of a launcher. How these start is tested with
conftest.CommandLine.fresh and .start_fresh."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.distributed as dist
from faults.injection import inject
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from xtuner_hydra import ranks as ranks_module
from xtuner_hydra.__main__ import main
from xtuner_hydra.app import App
from xtuner_hydra.errors import leave
from xtuner_hydra.launch import create
from xtuner_hydra.launch import prepare as prepare_composed
from xtuner_hydra.signals import SIGNALS
from xtuner_hydra.sweeps import forks as jobs
from xtuner_hydra.worker import train

TESTS = Path(__file__).parent
PRELOAD = ["forks", "matplotlib.pyplot", "numpy.random", "torch._dynamo", "xtuner_hydra.app", "xtuner_hydra.launch"]
_forks = multiprocessing.get_context("forkserver")


class Fork:
    """`function(*args)` in `directory` and `environment`. Its output goes to the file `output`, or what it says on stderr to `errors`; at SIGUSR2
    its stacks too.

    started: by time.monotonic()."""

    def __init__(self, function, *args, directory, output, environment, errors=None):
        serve()
        self.output = output
        self.before = output.stat().st_size if output.exists() else 0
        self.started = time.monotonic()
        place = (str(directory), str(output), str(errors or output), environment)
        self.process = _forks.Process(target=_run, args=(function, args, *place), daemon=function is not _command)  # which starts others
        self.process.start()

    @property
    def text(self):
        return self.output.read_text()

    @property
    def news(self):
        """What was added to the output since this process was started."""
        return self.output.read_bytes()[self.before :].decode()

    @property
    def pid(self):
        return self.process.pid

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, seconds=60):
        """The exit code, negative for a signal; fails, and ends the process, when it takes longer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.kill(self.process.pid, signal.SIGUSR2)
            time.sleep(1)
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text}")
        return self.process.exitcode


def command(directory, *args, name="output", errors=None, **environment):
    """`python -m xtuner_hydra ARGS` in `directory`; `environment` over that of tests."""
    words, environment = [*map(str, args)], tests_environment(directory) | environment
    return Fork(_command, words, directory=directory, output=directory / name, errors=errors, environment=environment)


def prepare(directory, *args):
    """A run directory `run` in `directory`, ready for its ranks, of what `python -m xtuner_hydra ARGS` would train."""
    arguments, environment = [*args, "hydra.run.dir=run"], tests_environment(directory)
    fork = Fork(_prepare, arguments, directory=directory, output=directory / "output", environment=environment)
    assert fork.wait(120) == 0, fork.text
    return directory / "run"


def train_on(run_dir, number=1, *, seconds=120, **environment):
    """Let the ranks of a prepared run directory come to their end: (exit codes, what the first one said now)."""
    log = run_dir.parent / "output-0"
    before = log.stat().st_size if log.exists() else 0
    codes = [fork.wait(seconds) for fork in ranks(run_dir, number, **environment)]
    return codes, log.read_bytes()[before:].decode()


def ranks(run_dir, number=1, **environment):
    """The ranks of a prepared run directory, each as a launcher starts it; they resume if its config says so."""
    if number == 1:
        places = [{}]
    else:
        # the store listens here, as a launcher's does, and ends with the last process that uses it
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        shared |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "TORCHELASTIC_RESTART_COUNT": "0"}
        places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    started = [
        Fork(
            train,
            run_dir,
            directory=run_dir.parent,
            output=run_dir.parent / f"output-{rank}",
            environment=tests_environment(run_dir.parent) | place | environment,
        )
        for rank, place in enumerate(places)
    ]
    if number > 1:
        started[0].store = store
    return started


def tell_place(directory, ranks):
    """A job that says which devices and how many threads it was given, and then waits."""
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), ranks, flush=True)
    time.sleep(60)
    return 0


def tests_environment(directory):
    """Of the tests, without what is a rank's or a person's: no netrc, no W&B settings, no token cache."""
    foreign = ("WANDB", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    own = {"XDG_CACHE_HOME": str(directory / ".cache"), "HOME": str(directory), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    return kept | own


def serve():
    """Start the server, once, where modules are found and with one thread."""
    _forks.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _prepare(args):
    with App(args) as app:
        composition = app.compose(app.overrides)
    create(prepare_composed(composition))


def _command(words):
    # a sweep's jobs are forked from the command, which has all that the sweep's own server would import once more
    jobs._context, jobs.begin_imports = multiprocessing.get_context("fork"), lambda: None
    SubprocessHandler._popen = _LaunchedRank
    sys.argv = [str(TESTS.parent / "xtuner_hydra" / "__main__.py"), *words]
    return main(words)


class _LaunchedRank:
    """What torch's launcher wants to know of a rank, which is forked from it instead of started.

    words: the command line of xtuner_hydra.ranks."""

    def __init__(self, words, environment):
        self._process = multiprocessing.get_context("fork").Process(target=_be_rank, args=(words, environment))
        with jobs._uninterrupted():  # the launcher's handlers are not for the rank
            self._process.start()
        self.pid = self._process.pid
        os.setpgid(self.pid, self.pid)  # before the launcher may end it with its group

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)


def _be_rank(words, environment):
    for number in {*SIGNALS, signal.SIGHUP, signal.SIGQUIT}:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = list(words[2:])  # what stands behind `python -m`
    leave(ranks_module.main())


def _run(function, args, directory, output, errors, environment):
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.setsid()
    os.chdir(directory)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    faulthandler.register(signal.SIGUSR2)
    inject()
    leave(function(*args) or 0)
