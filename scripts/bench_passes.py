"""A training step without its matrix products: what the passes over memory cost, and how much memory a step takes.

    python scripts/bench_passes.py [--steps 12] [--dtype bfloat16] [OVERRIDE]...

Trains a few packs of the main job with every product and attention replaced by zeros of the same shape and dtype, so that bf16 can be studied on
a machine without instructions for it. One process, under the preloaded allocator (LD_PRELOAD); oneDNN's and MKL's own memory is not included.
Losses are meaningless."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner_hydra import launch
from xtuner_hydra.app import App
from xtuner_hydra.engine import Engine
from xtuner_hydra.worker import train

aten = torch.ops.aten


class WithoutProducts(TorchDispatchMode):
    """Zeros in place of products; `seconds` by operator for everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is aten.mm.default:
            return args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        if function is aten.mm.out:
            return kwargs["out"].zero_()
        if function is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return _like(args[0]), args[0].new_zeros(*args[0].shape[:3], dtype=torch.float32)
        if function is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            return tuple(_like(x) for x in args[1:4])
        began = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[str(function).removeprefix("aten.")] += time.perf_counter() - began
        return result


def _like(x: torch.Tensor) -> torch.Tensor:
    """Zeros of (batch, heads, tokens, head_dim) in the layout of the kernel's results: heads beside each other in a token."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def main() -> None:
    """Train, and print a line per step, the peak and the costliest operators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    mode, step = WithoutProducts(), Engine.train_step
    seconds: list[float] = []

    def train_step(self: Engine, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        with mode:
            result = step(self, *args, **kwargs)
        seconds.append(time.perf_counter() - began)
        print(f"step {len(seconds)}: {seconds[-1]:.2f} s, peak {_peak_gb():.2f} GB", flush=True)
        return result

    Engine.train_step = train_step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        words = ["tracking=none", "checkpoint=none", "data.eval_path=null", "optimizer.nonfinite=skip", "parallelism.compile=false"]
        words += [f"trainer.total_steps={arguments.steps}", f"parallelism.param_dtype={arguments.dtype}", f"hydra.run.dir={run_dir}"]
        with App([*words, *arguments.overrides]) as app:
            launch.create(launch.prepare(app.compose(app.overrides)))
        train(run_dir)
    after = seconds[1:]
    print(f"{sum(after) / len(after):.2f} s per step (without step 1), peak {_peak_gb():.2f} GB; seconds per step by operator:")
    for name, total in mode.seconds.most_common(15):
        print(f"{total / len(seconds):8.3f}  {name}")


def _peak_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


if __name__ == "__main__":
    main()
