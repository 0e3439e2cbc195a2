"""How long the user waits: before the first step and after the last, for help and errors, between the jobs of a sweep.

    python scripts/bench_start.py [--rounds 3] [--out scripts/results/NAME] [OVERRIDE...]
    python scripts/bench_start.py model.num_hidden_layers=1 model.hidden_size=64 trainer.total_steps=2     (almost only the fixed costs)

Runs the real command line in its own directory with its own token cache: cold in the first round, warm in the others. Without overrides it
trains the main job for one step. The start of step 1 is the time at which metrics.jsonl gets it, less the step's own time; what a run does
before and after is split at the lines of its log, each part named by what its line reports as done. The sweep has three jobs of `debug=fast`,
one at a time: a job's cost beyond its training is the time from its start to the next job's, less its steps. The best and the median of the
rounds are shown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from xtuner_hydra.parallel.allocator import HUGE_PAGES

MAIN_JOB = ["model=qwen3_tiny", "data=openai_sft", "trainer.total_steps=1"]
TARGETS = {
    "--help": 1.0,
    "--cfg job": 1.0,
    "a config error": 1.0,
    "command to end of step 1, cold": 8.0,
    "command to end of step 1, warm": 6.0,
    "a sweep's job beyond its training": 4.0,
}
MARKS = {
    "tokenizer:": "imports, config, data, model",
    "Step ": "step 1, W&B opening beside it",
    "Evaluation": "evaluation",
    "checkpoint saved": "checkpoint",
    "exported": "export",
    "completed": "trackers closed, report",
}
"""The beginning of a log line, and what has been done when it appears."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the first has a cold token cache")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    parser.add_argument("overrides", nargs="*", help="config overrides, over the main job's first step")
    args = parser.parse_intermixed_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    split: dict[str, list[float]] = defaultdict(list)
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as directory:
            if number == 0:
                cache = tempfile.TemporaryDirectory()
            measure(Path(directory), Path(cache.name), number == 0, args.overrides, seconds, split)
        print(f"round {number + 1}: load {os.getloadavg()[0]:.1f}", flush=True)
    print(table(seconds, split))
    if args.out:
        save(args.out, seconds, split)


def measure(directory: Path, cache: Path, is_cold: bool, overrides: list[str], seconds: dict, split: dict) -> None:
    """One round of everything; adds to `seconds` by what was waited for and to `split` by part of a run."""
    for name, words in (("--help", ["--help"]), ("--cfg job", ["--cfg", "job"]), ("a config error", ["optimizer.lrr=1"])):
        seconds[name].append(timed(words, directory)[0])
    run = directory / "run"
    warmth = "cold" if is_cold else "warm"
    took, lines = timed([*MAIN_JOB, *overrides, "trainer.log_interval=1", f"data.cache_dir={cache}", f"hydra.run.dir={run}"], directory)
    row = next(row for row in rows(run) if "throughput/step_time" in row)
    ended = next(at for at, line in lines if "] Step 1/" in line)
    seconds[f"command to end of step 1, {warmth}"].append(ended)
    seconds[f"command to start of step 1, {warmth}"].append(ended - row["throughput/step_time"])
    seconds["last step to exit"].append(took - max(at for at, line in lines if "] Step " in line))
    if not is_cold:
        for part, spent in parts(lines, took).items():
            split[part].append(spent)
    sweep = directory / "sweep"
    words = [
        "-m",
        "debug=fast",
        "optimizer.lr=1e-5,2e-5,3e-5",
        "hydra.launcher.slots=1",
        f"hydra.sweep.dir={sweep}",
        f"data.cache_dir={cache}",
    ]
    _, lines = timed(words, directory)
    starts = [at for at, line in lines if line.endswith("started")]
    jobs = sorted(sweep.glob("[0-9]*_*"))
    trained = [sum(row.get("throughput/step_time", 0.0) for row in rows(job)) for job in jobs]
    for one, following, training in zip(starts, starts[1:], trained, strict=False):
        seconds["a sweep's job beyond its training"].append(following - one - training)


def timed(words: list[str], directory: Path) -> tuple[float, list[tuple[float, str]]]:
    """(seconds to the end, every line of output with the second at which it appeared) of `python -m xtuner_hydra WORDS`, as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if name not in {"LD_PRELOAD", *HUGE_PAGES}}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-u", "-m", "xtuner_hydra", *words]
    start, lines = time.perf_counter(), []
    with subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip("\n")))
    expected = 2 if words == ["optimizer.lrr=1"] else 0
    if process.returncode != expected:
        raise SystemExit("\n".join(line for _, line in lines) + f"\n{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - start, lines


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def parts(lines: list[tuple[float, str]], took: float) -> dict[str, float]:
    """Seconds by part of a run, from the times of its log lines. Steps after the first are in `other steps`."""
    spent: dict[str, float] = defaultdict(float)
    before = 0.0
    for at, line in lines:
        text = line.rpartition("INFO] ")[2] if "INFO] " in line else ""
        mark = next((mark for mark in MARKS if text.startswith(mark)), None)
        if mark is not None:
            part = "other steps" if mark == "Step " and MARKS[mark] in spent else MARKS[mark]
            spent[part] += at - before
            before = at
    spent["exit"] = took - before
    return dict(spent)


def table(seconds: dict[str, list[float]], split: dict[str, list[float]]) -> str:
    """Each wait with its target, then the parts of a warm run."""
    lines = [f"{'':<36}{'best':>8}{'median':>8}{'target':>8}"]
    for name, values in seconds.items():
        target = f"{TARGETS[name]:>8.1f}" if name in TARGETS else ""
        lines.append(f"{name:<36}{min(values):>8.2f}{statistics.median(values):>8.2f}{target}")
    lines += ["", "where a warm run's time goes"]
    lines += [f"  {name:<34}{min(values):>8.2f}{statistics.median(values):>8.2f}" for name, values in split.items()]
    return "\n".join(lines)


def save(out: Path, seconds: dict[str, list[float]], split: dict[str, list[float]]) -> None:
    """OUT.json: everything, with date, machine, versions, commit."""
    import torch

    out.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    about = {"date": datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv), "commit": commit, "cores": os.cpu_count()}
    about |= {"machine": platform.platform(), "torch": torch.__version__, "python": platform.python_version(), "load": os.getloadavg()[0]}
    everything = {**about, "targets": TARGETS, "seconds": seconds, "split": split}
    out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
