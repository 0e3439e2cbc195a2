"""SIGKILL at random moments, many of them inside a save: nothing that was committed is lost, and the resumed run is exact.

FAULT_TRIALS and FAULT_SEED set the number of trials over all kinds of run and the seed; with -n 0 a table is shown."""

import os
import random
import shutil
import time
from collections import Counter
from contextlib import suppress

import pytest
from conftest import read_rows
from exactness import assert_same, copy_until
from forks import command, ranks

from xtuner_hydra.checkpoint.commit import damage, numbered, step_of

STEPS = 30
TRIALS = int(os.environ.get("FAULT_TRIALS", 200))
SEED = int(os.environ.get("FAULT_SEED", 20261))
JOB = ("debug=fast", f"trainer.total_steps={STEPS}", "checkpoint.interval=1", "tracking=none", "data.eval_path=null", "data.num_workers=0")
KINDS = {
    "sync, keep=2": ("checkpoint.hf_interval=null",),
    "async, keep=1": ("checkpoint.hf_interval=null", "checkpoint.asynchronous=true", "checkpoint.keep=1"),
    "export every step": ("checkpoint.hf_interval=1",),
    "two ranks, async": (
        "checkpoint.hf_interval=null",
        "checkpoint.asynchronous=true",
        "parallelism.nproc_per_node=2",
        "trainer.global_batch_size=2",
    ),
}


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment(tmp_path, capsys, kind):
    run_trials(tmp_path, capsys, kind, TRIALS // len(KINDS))


@pytest.mark.parametrize("kind", ["async, keep=1", "export every step"])
def test_killed_a_few_times(tmp_path, capsys, kind):
    run_trials(tmp_path, capsys, kind, 5)


def run_trials(directory, capsys, kind, trials):
    seed = f"{SEED} {kind}"
    run = KilledRun(directory, KINDS[kind], random.Random(seed))
    try:
        for _ in range(trials):
            run.trial()
        run.finish()
    except AssertionError as error:
        raise AssertionError(f"{kind}, seed {seed}, trial {run.counts['trials']}: {error}") from error
    with capsys.disabled():
        print(f"\nSIGKILL | {kind} | seed {SEED} | " + ", ".join(f"{name} {count}" for name, count in run.counts.items()))
    assert run.counts["trials"] == trials


class KilledRun:
    """A run that is killed and resumed again and again; begun anew whenever it comes to its end."""

    def __init__(self, directory, overrides, rng):
        self.directory, self.rng = directory, rng
        self.ranks = 2 if "parallelism.nproc_per_node=2" in overrides else 1
        self.reference, self.run = directory / "reference", directory / "run"
        prepared = command(directory, *JOB, *overrides, "hydra.run.dir=reference")
        assert prepared.wait(200) == 0, prepared.text
        self.patience = 0.7 * (time.monotonic() - prepared.started)
        self.counts = Counter(dict.fromkeys(("trials", "aimed", "inside a save", "completed", "resumed"), 0))
        copy_until(self.reference, self.run, 0)

    def trial(self):
        """Start the run, kill it, and look at what is left."""
        before, is_aimed = self.newest(), self.rng.random() < 0.5
        rest = self.staging()
        processes = ranks(self.run, self.ranks)
        victim = self.rng.choice(processes)
        if is_aimed:
            self.wait_for_saves(victim.process, rest, self.rng.randint(1, 4))
            time.sleep(self.rng.uniform(0, 0.02))
        else:
            victim.process.join(self.rng.uniform(0, self.patience))
        was_alive = victim.process.exitcode is None
        victim.process.kill()
        codes = [self.ended(process) for process in processes]
        self.counts.update({"trials": 1, "aimed": is_aimed, "inside a save": bool(self.staging() - rest), "resumed": before > 0})
        if all(code == 0 for code in codes):
            return self.complete()
        assert was_alive or self.ranks > 1, processes[0].text
        # the others of a killed rank end by themselves, with one that ended well before it was seen
        assert set(codes) <= {-9, 0, 1}, codes
        self.assert_whole(before)

    def ended(self, rank):
        """The exit code of one of the ranks. One whose peer has died before all had met waits for it; a launcher ends such a one."""
        rank.process.join(20)
        if rank.process.exitcode is None:
            assert "resumed from" not in rank.news, rank.news
            rank.process.kill()
            self.counts["ended by the launcher"] += 1
        return rank.wait(10)

    def wait_for_saves(self, process, rest, number):
        """Until the `number`-th save from now on is under way, or the process is over."""
        seen = set()
        while len(seen) < number and process.exitcode is None and process.is_alive():
            seen |= self.staging() - rest
            time.sleep(0.0005)

    def staging(self):
        """Saves under way, or broken off: (directory, inode)."""
        found = set()
        for parent in ("checkpoints", "hf"):
            with suppress(FileNotFoundError), os.scandir(self.run / parent) as entries:
                found |= {
                    (entry.path, entry.inode()) for entry in entries if entry.name.startswith(".step-") and entry.name.endswith(".tmp")
                }
        return found

    def newest(self):
        return max((step_of(path) for path in numbered(self.run / "checkpoints")), default=0)

    def assert_whole(self, before):
        """Every committed directory is whole, the newest no older than `before`; hf/latest leads to one; metrics.jsonl can be read."""
        for path in [*numbered(self.run / "checkpoints"), *numbered(self.run / "hf")]:
            assert damage(path, content=True) is None
        assert self.newest() >= before
        latest = self.run / "hf" / "latest"
        if latest.is_symlink():
            assert damage(latest.resolve(strict=True), content=True) is None
        if (self.run / "metrics.jsonl").exists():
            assert len(read_rows(self.run)) >= self.newest()

    def complete(self):
        """The run has come to its end: it is the reference. Begin anew."""
        self.counts["completed"] += 1
        assert_same(self.run, self.reference, STEPS)
        if (self.reference / "hf").exists():
            ours, theirs = (run / "hf" / "latest" / "model.safetensors" for run in (self.run, self.reference))
            assert ours.read_bytes() == theirs.read_bytes()
        assert self.staging() == set()
        shutil.rmtree(self.run)
        copy_until(self.reference, self.run, 0)

    def finish(self):
        """Let it go on to its end, undisturbed."""
        processes = ranks(self.run, self.ranks)
        codes = [process.wait(120) for process in processes]
        assert codes == [0] * self.ranks, processes[0].text
        self.complete()
