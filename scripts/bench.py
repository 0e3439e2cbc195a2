"""Ours beside a plain transformers loop, on the same packs, in one run: tokens a second, seconds a step and where they
go, peak memory; as a table, and with --out as JSON and PNG.

    python scripts/bench.py [--steps 8] [--rounds 2] [--threads 2] [--of ours,plain] [--out scripts/results/NAME] [OVERRIDE...]
    python scripts/bench.py --of ours,ours/system,plain/tcmalloc,plain --steps 37
    python scripts/bench.py --of ours,plain --pack-length 4096 --layers 6 --vocab 32000
    python scripts/bench.py --of ours,lora,plain,plain_lora experiment=smollm2_sft model.pretrained=DIR     (DIR: see scripts/smollm2.py)

A step is one pack; with model.pretrained all start from its weights. The plain loop is what one writes by hand: transformers' model with fp32
weights, bf16 autocast (where the config computes in it), SDPA, full logits, fused AdamW, clipping; `plain_lora` the same with peft's adapter
of the config's shape. A name may end in the malloc that it runs under (`/system`, `/tcmalloc`, `/jemalloc`): without one, ours takes what its
command line would preload, the others the system's, as their users run them. Each contender runs in a process of its own, in turn; the first
step of each is left out. Peak: the process's greatest resident memory, loading included, and what was resident before the first step. The last
contender is what others are compared with."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

CONTENDERS = ("ours", "lora", "plain", "plain_lora")
SHAPES = {"pack_length": "data.pack_max_length", "layers": "model.num_hidden_layers", "vocab": "model.vocab_size"}
PHASES = ("forward", "loss", "backward", "clip", "optimizer", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the contenders take turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--of", default="ours,plain", help=f"who takes part, of {', '.join(CONTENDERS)}, each perhaps with /MALLOC")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    for name, key in SHAPES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"short for {key}=N")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="config overrides, e.g. model=qwen3_0p6b")
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, *(f"{key}={value}" for name, key in SHAPES.items() if (value := getattr(args, name)) is not None)]
    if args.contender:
        print(json.dumps(run(args.contender, args.steps, args.threads, overrides)))
        return
    if strangers := {name.partition("/")[0] for name in args.of.split(",")} - set(CONTENDERS):
        parser.error(f"--of: there is no {', '.join(sorted(strangers))}")
    results: dict[str, list[dict]] = {name: [] for name in args.of.split(",")}
    for number in range(args.rounds):
        for name in results:
            results[name].append(in_own_process(name, sys.argv[1:]))
            print(f"round {number + 1} {name}: {describe(results[name][-1])}", flush=True)
    print(table(results))
    if args.out:
        save(args.out, results)


def in_own_process(name: str, argv: list[str]) -> dict:
    contender, _, malloc = name.partition("/")
    command = [sys.executable, __file__, "--contender", contender, *argv]
    output = subprocess.run(command, env=environment(contender, malloc), check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def environment(contender: str, malloc: str) -> dict[str, str]:
    """This process's, with the malloc that the contender runs under."""
    from xtuner_hydra.parallel import allocator

    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    libraries = allocator.found()
    malloc = malloc or (next(iter(libraries), "system") if contender in ("ours", "lora") else "system")
    if malloc == "system":
        return plain
    if malloc not in libraries:
        raise SystemExit(f"{contender}/{malloc}: not on this machine. {allocator.HOW_TO_GET_ONE}")
    return plain | allocator.SETTINGS.get(malloc, {}) | {"LD_PRELOAD": str(libraries[malloc])}


def run(name: str, steps: int, threads: int, overrides: list[str]) -> dict:
    """Train `steps` steps; the median step's seconds without the first, tokens a second, peak memory, losses, where the time went."""
    import torch

    from xtuner_hydra.parallel import allocator

    torch.set_num_threads(threads)
    config, batches = packs(steps, [*overrides, *(["model.adapter=lora"] if "lora" in name else [])])
    seconds, losses, watch = [], [], Watch()
    with ExitStack() as stack:
        step, trainable = {"plain": plain, "plain_lora": plain}.get(name, ours)(config, stack, watch)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        for number, batch in enumerate(batches):
            if number == 1:
                watch.seconds.clear()
            start = time.perf_counter()
            losses.append(step(batch))
            seconds.append(time.perf_counter() - start)
    tokens = [batch.tokens for batch in batches]
    split = {phase: watch.seconds[phase] / (steps - 1) for phase in PHASES}
    split["other"] = sum(seconds[1:]) / (steps - 1) - sum(split.values())
    return {
        "malloc": allocator.active() or "system",
        "step_s": statistics.median(seconds[1:]),
        "tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]),
        "first_step_s": seconds[0],
        "trainable": trainable,
        "before_gb": before / 2**30,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "losses": losses,
        "seconds": seconds,
        "tokens": tokens,
        "split": split,
    }


class Watch:
    """Where a step's time goes: seconds in each phase, what is measured inside it apart."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    def timed(self, phase: str, function: Callable) -> Callable:
        """`function`, its time counted to `phase`."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[phase] += took - self._inner.pop()
                self._inner[-1] += took

        return call


def packs(steps: int, overrides: list[str]):
    """The first `steps` packs of the composed config's data."""
    from xtuner_hydra.app import App
    from xtuner_hydra.data.loader import train_batches
    from xtuner_hydra.launch import prepare

    length = [f"trainer.total_steps={steps}", "trainer.epochs=null", "trainer.global_batch_size=1"]
    with App([*length, f"hydra.run.dir={tempfile.mkdtemp()}", *overrides]) as app:
        prepared = prepare(app.compose(app.overrides), progress=False)
    batches = [batch.micro_batches[0] for batch in train_batches(prepared.data.plan, start_step=0, dp_rank=0, dp_size=1)]
    return prepared.config, batches


def ours(config, stack: ExitStack, watch: Watch) -> tuple[Callable, int]:
    import torch

    from xtuner_hydra import loss
    from xtuner_hydra.parallel.runtime import runtime
    from xtuner_hydra.worker import build_engine

    engine = build_engine(config, stack.enter_context(runtime(config)))
    engine._loss_sum, engine._norm = watch.timed("forward", engine._loss_sum), watch.timed("clip", engine._norm)
    torch.nn.utils.clip_grads_with_norm_ = watch.timed("clip", torch.nn.utils.clip_grads_with_norm_)
    torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)
    for name in ("forward", "backward"):
        setattr(loss._LinearCrossEntropy, name, staticmethod(watch.timed("loss", getattr(loss._LinearCrossEntropy, name))))
    for optimizer in engine.optimizers:
        optimizer.step = watch.timed("optimizer", optimizer.step)
    return lambda batch: float(engine.train_step([batch], len(batch.targets), config.optimizer.lr).loss), count(engine.model)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def plain(config, stack: ExitStack, watch: Watch) -> tuple[Callable, int]:
    import torch

    torch.manual_seed(config.trainer.seed)
    model = plain_model(config.model)
    if config.model.adapter:
        import peft

        lora = config.model.lora
        options = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": lora.targets}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.train()
    beta1, beta2 = config.optimizer.betas
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad],
        lr=config.optimizer.lr,
        betas=(beta1, beta2),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )

    forward, update = watch.timed("forward", model), watch.timed("optimizer", optimizer.step)
    clip = watch.timed("clip", torch.nn.utils.clip_grad_norm_)

    def step(batch) -> float:
        # positions that start again at 0 are how transformers knows packed documents apart
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.parallelism.param_dtype == "bfloat16"):
            logits = forward(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False).logits[0]
        loss = watch.timed("loss", lambda: torch.nn.functional.cross_entropy(logits.float(), batch.labels))()
        watch.timed("backward", loss.backward)()
        clip(model.parameters(), config.optimizer.max_grad_norm)
        update()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, count(model)


def plain_model(config):
    """transformers' model with fp32 weights: those of `pretrained`, or random ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from xtuner_hydra.model.families import hf_config

    if config.pretrained:
        return AutoModelForCausalLM.from_pretrained(config.pretrained, dtype="float32", attn_implementation="sdpa").train()
    shape = hf_config(config, "float32", bos_token_id=None, eos_token_id=257)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="sdpa")


def describe(result: dict) -> str:
    return (
        f"{result['step_s']:.2f} s a step (median; the first {result['first_step_s']:.1f}), {result['tokens_per_s']:.0f} tokens/s, "
        f"peak {result['peak_gb']:.2f} GB ({result['before_gb']:.2f} before the first step), {result['trainable'] / 1e6:.2f} M trained, "
        f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}, {result['malloc']} malloc"
    )


def table(results: dict[str, list[dict]]) -> str:
    """Medians over the rounds, beside the last contender's."""
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
    """OUT.json: everything, with date, machine, versions, commit. OUT.png: tokens a second, peak memory, where a step's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    out.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    about = {"date": datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv), "commit": commit, "cores": os.cpu_count()}
    about |= {"machine": platform.platform(), "torch": torch.__version__, "python": platform.python_version()}
    out.with_suffix(".json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")
    names = list(results)[::-1]
    figure, (speed, memory, split) = plt.subplots(1, 3, figsize=(13, 1 + 0.6 * len(names)), constrained_layout=True)
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
    split.set_title("seconds a step")
    split.legend(fontsize="small", ncols=2)
    figure.savefig(out.with_suffix(".png"), dpi=110)


def _median(results: list[dict], key: str) -> float:
    return statistics.median(result[key] for result in results)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
