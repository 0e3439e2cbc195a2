"""A few steps under torch's profiler (trainer.profile_steps), on the first rank: where their time went.

profile/trace.json      a timeline that opens in https://ui.perfetto.dev or chrome://tracing
profile/operators.txt   the operators that took longest, as a table
profile/memory.pickle   on a GPU: allocations, for https://pytorch.org/memory_viz"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"
WARM_UP = 2
"""Steps before the first that is profiled; the very first ones load and compile."""
ROWS = 30

log = logging.getLogger("xtuner_hydra")


class Profiler:
    """Profiles `steps` steps after WARM_UP others. Call `begin` before each step, `end` after it and `close` after the last. With
    0 steps it does nothing."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        self.directory = run_dir / FOLDER
        self.left = steps
        self.wait = WARM_UP
        self.profile: profile | None = None

    def begin(self) -> None:
        """A step begins."""
        if self.left == 0 or self.profile is not None:
            return
        if self.wait > 0:
            self.wait -= 1
            return
        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self.profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        if on_gpu:
            torch.cuda.memory._record_memory_history()
        self.profile.start()

    def end(self) -> None:
        """A step has ended; after the last one, write the profile."""
        if self.profile is None:
            return
        self.left -= 1
        if self.left == 0:
            self._write(self.profile)

    def close(self) -> None:
        """No step follows: if the profile is incomplete, write what there is, or report that there is none."""
        if self.left == 0:
            return
        if self.profile is None:
            log.warning(f"no profile: the run ended within the first {WARM_UP} steps, which are not profiled")
            return
        log.warning(f"the profile is shorter than requested: the run ended {self.left} steps too early")
        self._write(self.profile)

    def _write(self, done: profile) -> None:
        done.stop()
        self.profile, self.left = None, 0
        try:
            self._write_files(done)
        except OSError as error:
            log.warning(f"the profile could not be written, the run is not affected: {self.directory}: {error.strerror or error}")
            return
        log.info(f"profile written: {self.directory} (trace.json opens in https://ui.perfetto.dev)")

    def _write_files(self, done: profile) -> None:
        self.directory.mkdir(exist_ok=True)
        trace = self.directory / "trace.json"
        done.export_chrome_trace(str(trace))
        if not trace.exists():  # kineto reports this only on stderr, and leaves a partial file
            Path(f"{trace}.tmp").unlink(missing_ok=True)
            raise OSError("trace.json could not be written; is the disk full?")
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = done.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        (self.directory / "operators.txt").write_text(table, encoding="utf-8")
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.directory / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
