"""Jobs through submitit: `submitit_slurm` on a cluster (not run on one), `submitit_local` in processes of this machine.

A job is prepared here and runs on a machine that shares the run directory's file system. One that SLURM requeues continues from its newest
checkpoint, as every job of a sweep resumes by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner_hydra.errors import EXIT_FAILED, RefusedError
from xtuner_hydra.files import write_json
from xtuner_hydra.machine import cores

FOLDER = ".submitit"
TICKET = "submitit.json"
"""Beside a job's status.json: the job's id in the cluster."""


class Submitit:
    """`hydra/launcher=submitit_*`: conf/hydra/launcher/ says what the options mean."""

    grace_seconds = 120

    def __init__(self, options: dict[str, Any], sweep_dir: Path, *, ranks: int, jobs: int) -> None:
        """jobs: of the sweep. Raises RefusedError if submitit or the cluster is missing, or an option is unknown."""
        submitit = _submitit()
        self.ranks = ranks
        self.cluster = options.pop("cluster")
        self.elsewhere = self.cluster != "local"
        self.capacity = min(jobs, options.pop("jobs") or jobs)
        requeue = options.pop("requeue")
        shared: dict[str, Any] = {
            key: options.pop(key) for key in ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb") if key in options
        }
        own: dict[str, Any] = {f"{self.cluster}_{key}": value for key, value in options.items()}
        parameters = {key: value for key, value in {**shared, **own}.items() if value not in (None, [], {})}
        try:
            self.executor = submitit.AutoExecutor(
                sweep_dir / FOLDER / "%j", cluster=self.cluster, **{f"{self.cluster}_max_num_timeout": requeue}
            )
            self.executor.update_parameters(name="xtuner_hydra", **parameters)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise RefusedError(f"hydra/launcher=submitit_{self.cluster}: {' '.join(str(error).split())}") from None

    def describe(self) -> str:
        """`submitit on slurm, 64 at once`."""
        return f"submitit on {self.cluster}, {self.capacity} at once"

    def start(self, directory: Path) -> SubmittedJob:
        """Submit the job of a prepared run directory."""
        threads = None if self.elsewhere else max(1, cores() // (self.capacity * self.ranks))
        job = self.executor.submit(RunRanks(directory, self.ranks, threads))
        write_json(directory / TICKET, {"cluster": self.cluster, "folder": str(job.paths.folder), "id": job.job_id})
        return SubmittedJob(job)

    def adopt(self, directory: Path) -> SubmittedJob | None:
        """The job that is still queued or running on the cluster, though the sweep that submitted it was killed."""
        if not self.elsewhere or not (directory / TICKET).exists():
            return None
        ticket = json.loads((directory / TICKET).read_text(encoding="utf-8"))
        job = _submitit().SlurmJob(folder=ticket["folder"], job_id=ticket["id"])
        return None if job.done(force_check=True) else SubmittedJob(job)


@dataclass
class SubmittedJob:
    """A job run by submitit."""

    job: Any

    def poll(self) -> int | None:
        """The exit code, or None while it is queued or running. One that never reported how it ended counts as failed."""
        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except Exception:  # submitit raises what the job raised, or its own errors if the job is gone
            return EXIT_FAILED

    def stop(self) -> None:
        """Cancel it: SLURM sends SIGTERM first."""
        self.job.cancel()

    def kill(self) -> None:
        """SLURM sends SIGKILL by itself; a process on this machine gets it here."""
        if (process := getattr(self.job, "_process", None)) is not None:
            process.kill()
        else:
            self.job.cancel()


@dataclass(frozen=True)
class RunRanks:
    """What submitit carries to the node: train the run directory in its own process, so that signals and memory are its own too."""

    directory: Path
    ranks: int
    threads: int | None
    """CPU threads of a rank; None leaves them to the node."""

    def __call__(self) -> int:
        environment = os.environ | ({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})
        with (self.directory / "logs" / "console.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "xtuner_hydra.ranks", str(self.directory), str(self.ranks)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                return process.wait()
            except BaseException:  # cancelled, or about to be requeued
                process.terminate()
                process.wait()
                raise

    def checkpoint(self) -> Any:
        """Called by submitit before the time is up: the same task again, which continues from the newest checkpoint."""
        return _submitit().helpers.DelayedSubmission(self)


def refuse_missing(cluster: str) -> None:
    """RefusedError if submitit or the cluster is missing."""
    _submitit()
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise RefusedError("hydra/launcher=submitit_slurm: sbatch is not on the PATH; is this a node of a SLURM cluster?")


def _submitit():  # type: ignore[no-untyped-def]
    try:
        import submitit
    except ImportError:
        raise RefusedError("hydra/launcher=submitit_*: needs submitit; pip install 'xtuner-hydra[sweep]'") from None
    return submitit
