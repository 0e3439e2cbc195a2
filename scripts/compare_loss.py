"""Is a change neutral? The same packs from the same weights under two settings, step by step: loss and gradient norm of both, how far apart they
are, and a verdict. Exit code 0: neutral; 1: not; 2: a side could not be trained.

    python scripts/compare_loss.py [--steps 8] [--threads 1] [OVERRIDE...]       (against the same in float32)
    python scripts/compare_loss.py --against CHECKOUT [OVERRIDE...]              (against the package of another tree)
    python scripts/compare_loss.py --reference KEY=VALUE [OVERRIDE...]           (against the same with this change)

Each side trains with the engine of its tree, one pack per step (or trainer.global_batch_size=N), on one rank, in its own process, at the
constant rate optimizer.lr. Different tokens or labels are never neutral. A deviation is |value - reference| / |reference|; allowed are

- if both compute in float32, 1e-5 in every step: sums in another order (the same code with other CPUs' instruction sets) gave 3e-7 over 12
  steps, and wider models have longer sums; a learning rate that is off by 1 % exceeds it by the third step. Equal bits are reported as such.
- if one of them computes in bfloat16, 2^-9 for the loss and 2^-6 for the gradient norm. bfloat16 rounds by up to 2^-9 of a value; a loss
  averages many such errors (2e-4 measured over 12 steps), a norm less so (4e-3 measured).
- if both do, three times the largest deviation of the reference itself, over the steps, from the reference in float32, which is trained
  too: each side rounds in its own way, but neither may be much farther from the truth."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = "parallelism.param_dtype=float32"
IN_FLOAT32 = {"loss": 1e-5, "grad_norm": 1e-5}
IN_BFLOAT16 = {"loss": 2**-9, "grad_norm": 2**-6}
TIMES = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="the tree whose package trains the reference")
    parser.add_argument(
        "--reference", action="append", default=[], metavar="KEY=VALUE", help="an override of the reference alone; may be repeated"
    )
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="config overrides of both sides")
    args = parser.parse_intermixed_args()
    if args.side:
        print(json.dumps(train(args.steps, args.threads, args.overrides)))
        return 0
    if args.steps < 2:
        parser.error("--steps must be at least 2: the effect of an update shows only in the step after it")
    if not (tree := (args.against or ROOT).resolve()).joinpath("xtuner_hydra", "__init__.py").is_file():
        parser.error(f"--against {tree}: there is no xtuner_hydra")
    sys.path.insert(0, str(ROOT))
    options = ["--steps", str(args.steps), "--threads", str(args.threads)]
    changed = args.reference if args.reference or args.against else [FLOAT32]
    try:
        side = in_own_process(ROOT, [*options, *args.overrides])
        reference = in_own_process(tree, [*options, *args.overrides, *changed])
        in_bfloat16 = [side["dtype"], reference["dtype"]].count("bfloat16")
        truth = in_own_process(tree, [*options, *args.overrides, *changed, FLOAT32]) if in_bfloat16 == 2 else reference
    except subprocess.CalledProcessError as error:
        print(f"no verdict: {error}", file=sys.stderr)
        return 2
    allowed = IN_BFLOAT16 if in_bfloat16 == 1 else IN_FLOAT32
    if in_bfloat16 == 2:
        allowed = {name: TIMES * max(deviations(reference, truth, name)) for name in allowed}
    print(f"{side['dtype']} here, {reference['dtype']} in {tree}" + (f" with {' '.join(changed)}" if changed else ""))
    print(table(side, reference, truth))
    text, is_neutral = verdict(side, reference, truth, allowed)
    print(text)
    return 0 if is_neutral else 1


def in_own_process(tree: Path, argv: list[str]) -> dict:
    """What the script of `tree` returns for its package, under the malloc that training would use."""
    from bench import environment

    command = [sys.executable, str(tree / "scripts" / Path(__file__).name), "--side", *argv]
    output = subprocess.run(
        command, env=environment("ours") | {"PYTHONPATH": str(tree)}, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    trained = json.loads(output.splitlines()[-1])
    assert Path(trained["package"]).is_relative_to(tree), f"the package of {trained['package']} was found before that of {tree}"
    return trained


def train(steps: int, threads: int, overrides: list[str]) -> dict:
    """Train with the package that this process finds; returns its path, its compute dtype, and each step's data digest, loss and gradient
    norm."""
    import torch
    from bench_contenders import our_engine, packs

    import xtuner_hydra
    from xtuner_hydra.parallel.runtime import runtime

    torch.set_num_threads(threads)
    config, batches = packs(steps, 1, overrides)
    done = []
    with runtime(config) as place:
        engine = our_engine(config, place)
        for batch in batches:
            data = hashlib.sha256()
            for pack in batch.micro_batches:
                for tensor in (pack.ids, pack.labels, pack.positions):
                    data.update(tensor.numpy())
            result = engine.train_step(batch.micro_batches, batch.supervised_tokens, config.optimizer.lr)
            done.append({"data": data.hexdigest(), "loss": float(result.loss), "grad_norm": result.grad_norm})
    return {"package": os.path.abspath(xtuner_hydra.__file__), "dtype": config.parallelism.param_dtype, "steps": done}


def deviations(side: dict, reference: dict, name: str) -> list[float]:
    """The deviation of `name` in each step; nan if one value is not finite."""
    pairs = zip(side["steps"], reference["steps"], strict=True)
    return [0.0 if one[name] == other[name] else abs(one[name] - other[name]) / abs(other[name] or float("nan")) for one, other in pairs]


def table(side: dict, reference: dict, truth: dict) -> str:
    """A line per step: both values and how far they are from `truth`, which may be the reference itself."""
    titles = [
        title for name in IN_FLOAT32 for title in (name, "reference", "off by", *(["reference off by"] if truth is not reference else []))
    ]
    lines = ["step" + "".join(f"{title:>18}" for title in titles)]
    for number, (one, other) in enumerate(zip(side["steps"], reference["steps"], strict=True)):
        line = f"{number + 1:<4}"
        for name in IN_FLOAT32:
            line += f"{one[name]:>18.7g}{other[name]:>18.7g}{deviations(side, truth, name)[number]:>18.1e}"
            line += f"{deviations(reference, truth, name)[number]:>18.1e}" if truth is not reference else ""
        lines.append(line)
    return "\n".join(lines)


def verdict(side: dict, reference: dict, truth: dict, allowed: dict[str, float]) -> tuple[str, bool]:
    """(a sentence, whether the change is neutral): `side` is no farther from `truth` than `allowed` in any step."""
    for number, (one, other) in enumerate(zip(side["steps"], reference["steps"], strict=True)):
        if one["data"] != other["data"]:
            return f"NOT neutral: step {number + 1} has different tokens or labels", False
    if side["steps"] == reference["steps"]:
        return f"neutral: the same bits in all {len(side['steps'])} steps", True
    greatest = {name: deviations(side, truth, name) for name in allowed}
    for number in range(len(side["steps"])):
        for name, limit in allowed.items():
            if not greatest[name][number] <= limit:  # also true for nan
                return f"NOT neutral: step {number + 1}: {name} is off by {greatest[name][number]:.1e} (allowed {limit:.1e})", False
    found = ", ".join(f"{name} is off by {max(greatest[name]):.1e} at most (allowed {limit:.1e})" for name, limit in allowed.items())
    return f"neutral: {found}", True


if __name__ == "__main__":
    sys.exit(main())
