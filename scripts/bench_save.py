"""What a checkpoint costs a run: none, one that training waits for, one in the background.

    python scripts/bench_save.py [--rounds 3] [--out scripts/results/NAME] [OVERRIDE...]

Trains seven steps of the main job with the real command line, with a checkpoint after the fourth. Its cost is the time from the first step to
the end of the seventh, less that of a run without one. The first round's order is none, synchronous, asynchronous; every second round's is
reversed."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from bench_start import rows, save, timed

STEPS, SAVED = 7, 4
KINDS = {
    "none": ["checkpoint=none"],
    "synchronous": [f"checkpoint.interval={SAVED}", "checkpoint.hf_interval=null"],
    "asynchronous": [f"checkpoint.interval={SAVED}", "checkpoint.hf_interval=null", "checkpoint.asynchronous=true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write OUT.json")
    parser.add_argument("overrides", nargs="*", help="config overrides, over the main job's")
    args = parser.parse_intermixed_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        for kind in list(KINDS) if number % 2 == 0 else reversed(KINDS):
            took = train(kind, args.overrides)
            seconds[kind].append(took[-1]["elapsed"] - took[0]["elapsed"])
            steps[kind] += [row["throughput/step_time"] for row in took[1:]]
            memory[kind].append(took[-1]["memory/max_gb"])
        print(f"round {number + 1}: load {os.getloadavg()[0]:.1f}", flush=True)
    print(table(seconds, steps, memory))
    if args.out:
        save(args.out, seconds, steps)


def train(kind: str, overrides: list[str]) -> list[dict[str, float]]:
    """A row per step; `elapsed`: seconds from the start of step 1 to the step's end."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        words = ["tracking=none", "tracking.jsonl=true", "data.eval_path=null", f"trainer.total_steps={STEPS}", *KINDS[kind]]
        _, lines = timed([*words, *overrides, f"hydra.run.dir={run}"], Path(directory))
        print(kind, *(line.rpartition("] ")[2] for _, line in lines if "checkpoint saved" in line), sep="\n  ", flush=True)
        found = [row for row in rows(run) if "throughput/step_time" in row]
    return [row | {"elapsed": row["train/total_tokens"] / row["throughput/e2e_tgs"]} for row in found]


def table(seconds: dict[str, list[float]], steps: dict[str, list[float]], memory: dict[str, list[float]]) -> str:
    """Seconds of steps 2 to 7, what the save adds to them, in seconds and in steps, and the peak."""
    step = statistics.median(steps["none"])
    lines = [f"per step: {step:.2f} s (median without a save)", f"{'':<14}{'steps 2-7':>12}{'the save':>10}{'in steps':>10}{'peak GB':>9}"]
    for kind, values in seconds.items():
        cost = statistics.median(values) - statistics.median(seconds["none"])
        peak = max(memory[kind])
        lines.append(f"{kind:<14}{statistics.median(values):>12.1f}{cost:>10.1f}{cost / step:>10.2f}{peak:>9.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
