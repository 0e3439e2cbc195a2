"""Ours, in full and with LoRA, beside a plain transformers loop, on the same packs, in one run: seconds a step, tokens a second, peak memory.

    python scripts/bench_plain.py [--steps 8] [--rounds 2] [--threads 2] [--of ours,lora,plain,plain_lora] [OVERRIDE...]
    python scripts/bench_plain.py --of ours,lora,plain,plain_lora experiment=smollm2_sft model.pretrained=DIR      (DIR: see scripts/smollm2.py)

A step is one pack; with model.pretrained all start from its weights. The plain loop is what one writes by hand: transformers' model with fp32
weights, bf16 autocast, SDPA, full logits, fused AdamW, clipping; `plain_lora` the same with peft's adapter of the config's shape. Each contender
runs in a process of its own, in turn; the first step of each is left out of the medians. Peak: the process's greatest resident memory, loading
included, and what was resident before the first step."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

CONTENDERS = ("ours", "lora", "plain", "plain_lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the contenders take turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--of", default="ours,plain", help=f"who takes part, of {', '.join(CONTENDERS)}; the last is what others are compared with"
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="config overrides, e.g. model=qwen3_0p6b")
    args = parser.parse_intermixed_args()
    if args.contender:
        print(json.dumps(run(args.contender, args.steps, args.threads, args.overrides)))
        return
    if strangers := set(args.of.split(",")) - set(CONTENDERS):
        parser.error(f"--of: there is no {', '.join(sorted(strangers))}")
    results: dict[str, list[dict]] = {name: [] for name in args.of.split(",")}
    for number in range(args.rounds):
        for name in results:
            results[name].append(in_own_process(name, sys.argv[1:]))
            print(f"round {number + 1} {name}: {describe(results[name][-1])}", flush=True)
    report(results)


def in_own_process(name: str, argv: list[str]) -> dict:
    output = subprocess.run([sys.executable, __file__, "--contender", name, *argv], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run(name: str, steps: int, threads: int, overrides: list[str]) -> dict:
    """Train `steps` steps; the median step's seconds without the first, tokens a second, peak memory, losses."""
    import torch

    torch.set_num_threads(threads)
    config, batches = packs(steps, [*overrides, *(["model.adapter=lora"] if "lora" in name else [])])
    seconds, losses = [], []
    with ExitStack() as stack:
        step, trainable = (plain if "plain" in name else ours)(config, stack)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        for batch in batches:
            start = time.perf_counter()
            losses.append(step(batch))
            seconds.append(time.perf_counter() - start)
    tokens = [batch.tokens for batch in batches]
    return {
        "step_s": statistics.median(seconds[1:]),
        "tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]),
        "trainable": trainable,
        "before_gb": before / 2**30,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "losses": losses,
    }


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


def ours(config, stack: ExitStack) -> tuple[Callable, int]:
    from xtuner_hydra.parallel.runtime import runtime
    from xtuner_hydra.worker import build_engine

    engine = build_engine(config, stack.enter_context(runtime(config)))
    return lambda batch: float(engine.train_step([batch], len(batch.targets), config.optimizer.lr).loss), count(engine.model)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def plain(config, stack: ExitStack) -> tuple[Callable, int]:
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

    def step(batch) -> float:
        # positions that start again at 0 are how transformers knows packed documents apart
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
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
        f"{result['step_s']:.2f} s a step (median), {result['tokens_per_s']:.0f} tokens/s, "
        f"peak {result['peak_gb']:.2f} GB ({result['before_gb']:.2f} before the first step), {result['trainable'] / 1e6:.2f} M trained, "
        f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
    )


def report(results: dict[str, list[dict]]) -> None:
    *others, last = results
    for name in others:
        ratio = {key: _median(results[name], key) / _median(results[last], key) for key in ("step_s", "tokens_per_s", "peak_gb")}
        print(f"{name} / {last}: step {ratio['step_s']:.2f}, tokens/s {ratio['tokens_per_s']:.2f}, peak memory {ratio['peak_gb']:.2f}")


def _median(results: list[dict], key: str) -> float:
    return statistics.median(result[key] for result in results)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
