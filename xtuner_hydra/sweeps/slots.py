"""Jobs side by side on this machine: how many at once, and which devices and threads each sees.

A slot is a share of the machine. On GPUs a slot is as many of them as a job has ranks; on a CPU the number of slots is limited by cores and
memory, and the cores are divided evenly."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from xtuner_hydra.errors import RefusedError
from xtuner_hydra.machine import cores, lines, memory_gb
from xtuner_hydra.ranks import start_ranks
from xtuner_hydra.sweeps import forks


@dataclass
class Slots:
    """`hydra/launcher=slots`: conf/hydra/launcher/slots.yaml says what the options mean."""

    slots: int | None = None
    threads: int | None = None
    devices: list[int] | None = None
    free: list[int] = field(default_factory=list, init=False)
    capacity: int = field(default=1, init=False)
    elsewhere = False
    grace_seconds = 60

    def __post_init__(self) -> None:
        for name in ("slots", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RefusedError(f"hydra.launcher.{name}={value}: must be a whole number, at least 1, or null")

    def fit(self, ranks: int, gpus: int, job_gb: float, jobs: int) -> None:
        """Decide the number of slots for `jobs` jobs of `ranks` ranks, each of which takes about `job_gb` of memory. gpus: 0 = on the CPU.

        Raises RefusedError if not even one job fits on the named devices."""
        if missing := [device for device in self.devices or [] if device not in range(gpus)]:
            raise RefusedError(f"hydra.launcher.devices: {missing[0]} is not a GPU that a job can use; there are {gpus}, counted from 0")
        self.ranks, self.gpus = ranks, list(range(gpus)) if self.devices is None else list(self.devices)
        if gpus == 0:
            room = min(cores() // ranks, int(available_gb() // job_gb))
        elif (room := len(self.gpus) // ranks) == 0:
            raise RefusedError(f"hydra.launcher.devices: {len(self.gpus)} devices, but a job has parallelism.nproc_per_node={ranks} ranks")
        elif self.slots is not None and self.slots > room:
            raise RefusedError(f"hydra.launcher.slots={self.slots}: {len(self.gpus)} devices hold {room} jobs of {ranks} ranks")
        self.on_gpus = gpus > 0
        self.capacity = max(1, min(room if self.slots is None else self.slots, jobs))
        self.free = list(range(self.capacity))

    def describe(self) -> str:
        """`2 slots of 1 thread`."""
        share = f"{self.ranks} GPU" if self.on_gpus else f"{self.threads_each * self.ranks} thread"
        plural = "s" * (self.capacity > 1), "s" * (not share.startswith("1 "))
        return f"{self.capacity} slot{plural[0]} of {share}{plural[1]}"

    @property
    def threads_each(self) -> int:
        """CPU threads of one rank."""
        if self.threads is not None:
            return self.threads
        asked = os.environ.get("OMP_NUM_THREADS", "")
        return int(asked) if asked.isdigit() and int(asked) else max(1, cores() // (self.capacity * self.ranks))

    def start(self, directory: Path) -> LocalJob:
        """Start the job of a prepared run directory in a free slot."""
        slot = self.free.pop(0)
        variables = {"OMP_NUM_THREADS": str(self.threads_each)}
        if self.on_gpus:
            mine = self.gpus[slot * self.ranks : (slot + 1) * self.ranks]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, _visible(mine)))
        process = forks.start(start_ranks, directory, self.ranks, variables)
        return LocalJob(process, self, slot)

    def adopt(self, directory: Path) -> None:
        """None: a job here ends with the process that started it."""
        return None


@dataclass
class LocalJob:
    """A job's process, the leader of its group."""

    process: BaseProcess
    slots: Slots
    slot: int | None

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs. Its slot is free from then on."""
        code = self.process.exitcode
        if code is not None and self.slot is not None:
            self._signal_group(signal.SIGKILL)  # ranks that have outlived it
            self.slots.free.append(self.slot)
            self.slots.free.sort()
            self.slot = None
        return code

    def stop(self) -> None:
        """Ask it to close its files and end."""
        self.process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()  # it may not lead its group yet
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def available_gb() -> float:
    """Memory available to programs: MemAvailable, or all there is if the system does not report it; a container's limit counts."""
    total = memory_gb()
    for line in lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            total = int(line.split()[1]) / 2**20
    limits = [text for text in lines("/sys/fs/cgroup/memory.max") if text.isdigit()]
    return min([total, *(int(limit) / 2**30 for limit in limits)])


def _visible(devices: list[int]) -> list[str]:
    """`devices`, numbered as this process sees them, by the names that an outer CUDA_VISIBLE_DEVICES gives them."""
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = outer.split(",") if outer else None
    return [names[device] if names and device < len(names) else str(device) for device in devices]
