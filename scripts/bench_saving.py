"""How long training stands still for a checkpoint: saved at once, and behind training.

    python scripts/bench_saving.py [OVERRIDE ...]          (default: model=qwen3_tiny data=openai_sft)

One run for each of the two ways, every third step saved. Of a run: the median time of a step that no save touches, what a step that is saved
takes on top of that until the next one begins, what the steps take longer while a save goes on behind them, and when it was committed."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

STEPS, INTERVAL, WARM_UP = 12, 3, 1
JOB = [
    "tracking=none",
    "data.eval_path=null",
    "checkpoint.hf_interval=null",
    f"trainer.total_steps={STEPS}",
    f"checkpoint.interval={INTERVAL}",
]


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    chosen = sys.argv[1:] or ["model=qwen3_tiny", "data=openai_sft"]
    print(f"{' '.join(chosen)}: {STEPS} steps, saved after every {INTERVAL} of them")
    print(f"{'':<6}{'step':>10}{'stall':>10}{'steps beside a save':>21}{'committed after':>17}{'checkpoint':>12}")
    for name, asynchronous in (("sync", "false"), ("async", "true")):
        with tempfile.TemporaryDirectory() as directory:
            overrides = [*chosen, *JOB, f"checkpoint.asynchronous={asynchronous}", f"hydra.run.dir={directory}/run"]
            print(f"{name:<6}{measure(overrides, Path(directory) / 'run')}", flush=True)


def measure(overrides: list[str], run: Path) -> str:
    """Train, with a clock at the edges of steps and saves; a line of the table."""
    from xtuner_hydra.__main__ import main as command
    from xtuner_hydra.checkpoint.saver import Saver
    from xtuner_hydra.trainer import Trainer

    began: list[float] = []  # of every step
    stalls: list[float] = []  # of every save, until training goes on
    saves: list[tuple[float, float]] = []  # from the wish to the commit
    train, save, commit = Trainer.train, Trainer.save, Saver._commit

    def timed_train(self, batch):
        began.append(time.perf_counter())
        train(self, batch)

    def timed_save(self):
        saves.append((time.perf_counter(), 0.0))
        save(self)
        stalls.append(time.perf_counter() - saves[len(stalls)][0])

    def timed_commit(self, *args):
        commit(self, *args)
        number = next(number for number, (_, end) in enumerate(saves) if not end)
        saves[number] = (saves[number][0], time.perf_counter())

    Trainer.train, Trainer.save, Saver._commit = timed_train, timed_save, timed_commit
    try:
        if command(overrides) != 0:
            sys.exit("the run failed")
    finally:
        Trainer.train, Trainer.save, Saver._commit = train, save, commit
    size = sum(path.stat().st_size for path in (run / "checkpoints" / f"step-{STEPS}").iterdir())
    return row(began, stalls, saves, size)


def row(began: list[float], stalls: list[float], saves: list[tuple[float, float]], size: int) -> str:
    """Medians, in milliseconds. A step that a save follows ends where that begins."""
    ends = [next((start for start, _ in saves if at < start < after), after) for at, after in pairwise(began)]
    free, beside = [], []
    for at, end in list(zip(began, ends, strict=False))[WARM_UP:]:
        is_beside = any(start < end and at < committed for start, committed in saves)
        (beside if is_beside else free).append(end - at)
    step = statistics.median(free) if free else float("nan")
    more = f"{1000 * (statistics.median(beside) - step):+.0f} ms" if beside else "-"
    after = statistics.median(committed - start for start, committed in saves[1:])
    stall = statistics.median(stalls[1:])
    return f"{1000 * step:>7.0f} ms{1000 * stall:>7.0f} ms{more:>21}{1000 * after:>14.0f} ms{size / 1e6:>9.1f} MB"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
