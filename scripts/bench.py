"""Ours beside a plain transformers loop and others, on the same packs, in one run: tokens per second, seconds per step and where they
go, peak memory; as a table, and with --out as JSON and PNG.

    python scripts/bench.py [--steps 8] [--rounds 2] [--threads 2] [--of ours,plain] [--out scripts/results/NAME] [OVERRIDE...]
    python scripts/bench.py --of ours,ours/system,plain/tcmalloc,plain --steps 37
    python scripts/bench.py --of ours,trl,plain                                (needs TRL: pip install trl)
    python scripts/bench.py --of ours --ranks 2,1                              (two ranks of one thread beside one of two)
    python scripts/bench.py --of ours,plain --pack-length 4096 --layers 6 --vocab 32000
    python scripts/bench.py --of ours,lora,plain,plain_lora experiment=smollm2_sft model.pretrained=DIR     (DIR: see scripts/smollm2.py)

A step is one pack (or trainer.global_batch_size=N); with model.pretrained all start from its weights. The plain loop is what one would write
by hand: transformers' model with fp32 weights, bf16 autocast (if the config computes in it), SDPA, full logits, fused AdamW, clipping;
`plain_lora` the same with peft's adapter of the config's shape. `trl`: TRL's SFTTrainer, see bench_trl.py. A name may end in the malloc
that it runs under (`/system`, `/tcmalloc`, `/jemalloc`), and then gets huge pages, as ours does. Without one, ours uses what its command
line would preload, the others the system's and small pages, as their users run them. Each contender runs in its own process, in turn; the
first step of each is left out. Peak: the process's largest resident memory, loading included, and what was resident before the first step.
The others are compared with the last contender. If the machine is busy, look at its load (of the last minute) and at each step's CPU
seconds, which are then more reliable.

--ranks N,M: ours (and lora) on each of these numbers of gloo ranks under torchrun, which share the threads evenly. A step then has as many
packs as the largest number of ranks, for every contender; tokens are those of all ranks, memory is summed (shared memory counts once per rank)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path

CONTENDERS = ("ours", "lora", "plain", "plain_lora", "trl")
WITH_RANKS = ("ours", "lora")
SHAPES = {"pack_length": "data.pack_max_length", "layers": "model.num_hidden_layers", "vocab": "model.vocab_size"}
PHASES = ("forward", "loss", "backward", "clip", "optimizer", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps per round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the contenders take turns")
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--ranks", type=numbers, default=[1], help="numbers of ranks that ours runs on in turn, N,M,...")
    parser.add_argument("--of", default="ours,plain", help=f"the contenders, of {', '.join(CONTENDERS)}, each optionally with /MALLOC")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    for name, key in SHAPES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"short for {key}=N")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="config overrides, e.g. model=qwen3_0p6b")
    args = parser.parse_intermixed_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first step, which also loads and compiles, is not measured")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    overrides = [*args.overrides, *(f"{key}={value}" for name, key in SHAPES.items() if (value := getattr(args, name)) is not None)]
    if args.contender:
        from bench_contenders import run

        rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        result = run(args.contender, args.steps, max(args.ranks), args.threads // ranks, overrides)
        if rank == 0:
            print(json.dumps(result))
        return
    names = {name.partition("/")[0] for name in args.of.split(",")}
    if strangers := names - set(CONTENDERS):
        parser.error(f"--of: there is no {', '.join(sorted(strangers))}")
    if "trl" in names and importlib.util.find_spec("trl") is None:
        parser.error("--of: trl is not installed here; pip install trl")
    if uneven := [ranks for ranks in args.ranks if args.threads % ranks]:
        parser.error(f"--threads {args.threads} cannot be divided evenly among {uneven[0]} ranks")
    results: dict[str, list[dict]] = {entry: [] for name in args.of.split(",") for entry in entries(name, args.ranks)}
    for number in range(args.rounds):
        for entry in results:
            results[entry].append(in_own_process(entry, args.threads, sys.argv[1:]))
            print(f"round {number + 1} {entry}: {describe(results[entry][-1])}", flush=True)
    print(table(results))
    if args.out:
        save(args.out, results)


def numbers(text: str) -> list[int]:
    """`1,2` as numbers of at least 1."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def entries(name: str, ranks: list[int]) -> list[str]:
    """NAME for one rank, `NAME x2` for two; a contender without ranks takes part once."""
    return [name if number == 1 else f"{name} x{number}" for number in ranks] if name.partition("/")[0] in WITH_RANKS else [name]


def in_own_process(entry: str, threads: int, argv: list[str]) -> dict:
    name, _, ranks = entry.partition(" x")
    contender, _, malloc = name.partition("/")
    variables = environment(contender, malloc)
    launcher = []
    if ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        variables["OMP_NUM_THREADS"] = str(threads // int(ranks))
    command = [sys.executable, *launcher, __file__, "--contender", contender, *argv]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{entry} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(contender: str, malloc: str = "") -> dict[str, str]:
    """This process's environment, with the malloc that the contender runs under and the huge pages that ours requests."""
    from xtuner_hydra.parallel import allocator

    plain = {name: value for name, value in os.environ.items() if name not in {"LD_PRELOAD", *allocator.HUGE_PAGES}}
    if malloc or contender in WITH_RANKS:
        plain |= allocator.huge_pages()
    libraries = allocator.found()
    malloc = malloc or (next(iter(libraries), "system") if contender in WITH_RANKS else "system")
    if malloc == "system":
        return plain
    if malloc not in libraries:
        raise SystemExit(f"{contender}/{malloc}: not on this machine. {allocator.HOW_TO_GET_ONE}")
    return plain | allocator.environment(malloc, libraries[malloc])


def describe(result: dict) -> str:
    return (
        f"{result['step_s']:.2f} s per step (median; the first {result['first_step_s']:.1f}; {result['cpu_s']:.2f} CPU s), "
        f"{result['tokens_per_s']:.0f} tokens/s, "
        f"peak {result['peak_gb']:.2f} GB ({result['before_gb']:.2f} before the first step), {result['trainable'] / 1e6:.2f} M trained, "
        f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}, {result['malloc']} malloc, load {result['load']:.1f}"
    )


def table(results: dict[str, list[dict]]) -> str:
    """Medians over the rounds, compared with the last contender's."""
    last = list(results)[-1]
    titles = ("tokens/s", f"x {last}", "s/step", "peak GB", f"x {last}", *PHASES)
    lines = [f"{'':<16}" + "".join(f"{title:>12}" for title in titles)]
    for name, rounds in results.items():
        speed, memory = (_median(rounds, key) / _median(results[last], key) for key in ("tokens_per_s", "peak_gb"))
        split = [statistics.median(one["split"][phase] for one in rounds) for phase in PHASES]
        numbers = (_median(rounds, "tokens_per_s"), speed, _median(rounds, "step_s"), _median(rounds, "peak_gb"), memory, *split)
        lines.append(f"{name:<16}" + "".join(f"{number:>12.2f}" for number in numbers))
    return "\n".join(lines)


def save(out: Path, results: dict[str, list[dict]]) -> None:
    """OUT.json: everything, with date, machine, versions, commit. OUT.png: tokens per second, peak memory, where a step's time goes."""
    import torch

    out.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    about = {"date": datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv), "commit": commit, "cores": os.cpu_count()}
    about |= {"machine": platform.platform(), "torch": torch.__version__, "python": platform.python_version()}
    out.with_suffix(".json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")
    draw(out.with_suffix(".png"), results)


def draw(png: Path, results: dict[str, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results)[::-1]
    figure, (speed, memory, split) = plt.subplots(1, 3, figsize=(13, 1.4 + 0.6 * len(names)), constrained_layout=True)
    for axes, key, title in ((speed, "tokens_per_s", "tokens/s"), (memory, "peak_gb", "peak memory, GB")):
        bars = axes.barh(names, [_median(results[name], key) for name in names], color="#4477aa")
        axes.bar_label(bars, fmt="%.0f" if key == "tokens_per_s" else "%.2f", padding=3)
        axes.set_title(title)
        axes.margins(x=0.15)
    left = [0.0] * len(names)
    for phase in PHASES:
        seconds = [statistics.median(one["split"][phase] for one in results[name]) for name in names]
        split.barh(names, seconds, left=left, label=phase)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    split.set_title("seconds per step")
    figure.legend(loc="outside lower right", fontsize="small", ncols=len(PHASES))
    figure.savefig(png, dpi=110)


def _median(results: list[dict], key: str) -> float:
    return statistics.median(result[key] for result in results)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
