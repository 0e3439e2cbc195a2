"""The contenders of bench.py, each a function that trains the given packs and reports every step to a Watch. Run bench.py."""

from __future__ import annotations

import functools
import os
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from bench import PHASES

from xtuner_hydra import loss
from xtuner_hydra.app import App
from xtuner_hydra.build import build_engine
from xtuner_hydra.config.schema import Config
from xtuner_hydra.data.loader import StepBatch, train_batches
from xtuner_hydra.engine import Engine
from xtuner_hydra.launch import prepare
from xtuner_hydra.parallel import allocator
from xtuner_hydra.parallel.runtime import Runtime, runtime


def run(name: str, steps: int, batch_size: int, threads: int, overrides: list[str]) -> dict:
    """Train `steps` steps; returns the median step's seconds without the first, tokens per second, peak memory, losses, where the time went."""
    torch.set_num_threads(threads)
    config, batches = packs(steps, batch_size, [*overrides, *(["model.adapter=lora"] if "lora" in name else [])])
    if config.optimizer.name != "adamw" and name not in ("ours", "lora"):
        raise SystemExit(f"optimizer={config.optimizer.name}: the others train only with AdamW")
    watch = Watch()
    trainable = _trainer(name)(config, batches, watch)
    seconds, tokens = watch.steps[1:], watch.tokens[1:]
    split = {phase: watch.seconds[phase] / len(seconds) for phase in PHASES}
    split["other"] = statistics.mean(seconds) - sum(split.values())
    return {
        "malloc": allocator.active() or "system",
        "huge_pages": allocator.pages(),
        "load": os.getloadavg()[0],
        "step_s": statistics.median(seconds),
        "cpu_s": statistics.median(watch.cpu[1:]),
        "tokens_per_s": sum(tokens) / sum(seconds),
        "first_step_s": watch.steps[0],
        "trainable": trainable,
        "before_gb": watch.before / 2**30,
        "peak_gb": watch.peak / 2**30,
        "losses": watch.losses,
        "seconds": watch.steps,
        "tokens": watch.tokens,
        "split": split,
    }


def _trainer(name: str) -> Callable[[Config, list[StepBatch], Watch], int]:
    """The function that trains the packs and returns the number of trained parameters."""
    if name == "trl":
        from bench_trl import trl

        return trl
    return plain if name.startswith("plain") else ours


def packs(steps: int, batch_size: int, overrides: list[str]) -> tuple[Config, list[StepBatch]]:
    """The composed config, and this rank's part of the first `steps` steps of its data, `batch_size` packs each unless an override says
    otherwise."""
    defaults = [f"trainer.total_steps={steps}", "trainer.epochs=null", f"trainer.global_batch_size={batch_size}"]
    with tempfile.TemporaryDirectory() as directory, App([*defaults, f"hydra.run.dir={directory}/run", *overrides]) as app:
        prepared = prepare(app.compose(app.overrides), progress=False)
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    return prepared.config, list(train_batches(prepared.data.plan, start_step=0, dp_rank=rank, dp_size=ranks))


class Watch:
    """Seconds, CPU seconds, tokens and loss of each step; seconds of each phase in all steps but the first, without phases measured inside it;
    resident bytes before the first step and at the peak."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.cpu: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.seconds: Counter[str] = Counter()
        self.before = self.peak = 0.0
        self._inner = [0.0]

    def begin(self) -> None:
        """A step begins."""
        if not self.steps:
            self.before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        if len(self.steps) == 1:
            self.seconds.clear()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def end(self, loss: float, tokens: int) -> None:
        """The step is done."""
        self.steps.append(time.perf_counter() - self._began)
        self.cpu.append(time.process_time() - self._cpu_began)
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10

    def all_ranks(self) -> None:
        """Add up the memory of all ranks; shared pages count once per rank. Collective."""
        taken = torch.tensor([self.before, self.peak, *self.cpu], dtype=torch.float64)
        dist.all_reduce(taken)
        self.before, self.peak, *self.cpu = taken.tolist()

    def timed(self, phase: str, function: Callable) -> Callable:
        """`function`, with its time counted towards `phase`."""

        @functools.wraps(function)
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


def ours(config: Config, batches: list[StepBatch], watch: Watch) -> int:
    """Our engine, on as many ranks as torchrun started."""
    with runtime(config) as place:
        engine = our_engine(config, place)
        engine._loss_sum, engine._norm = watch.timed("forward", engine._loss_sum), watch.timed("clip", engine._norm)
        torch.nn.utils.clip_grads_with_norm_ = watch.timed("clip", torch.nn.utils.clip_grads_with_norm_)
        torch.Tensor.backward = watch.timed("backward", torch.Tensor.backward)
        for name in ("forward", "backward"):
            setattr(loss._LinearCrossEntropy, name, staticmethod(watch.timed("loss", getattr(loss._LinearCrossEntropy, name))))
        for optimizer in engine.optimizers:
            optimizer.step = watch.timed("optimizer", optimizer.step)
        for batch in batches:
            watch.begin()
            result = engine.train_step(batch.micro_batches, batch.supervised_tokens, config.optimizer.lr)
            watch.end(float(result.loss), batch.tokens)
        watch.all_ranks()
        return count(engine.model)


def our_engine(config: Config, place: Runtime) -> Engine:
    """The engine as a worker builds it, compiled with parallelism.compile=true only: `auto` decides by the length of a real run."""
    if getattr(config.parallelism, "compile", None) == "true":  # compare_loss.py trains with older trees too, which do not compile
        from xtuner_hydra.pointwise import compile_pointwise

        compile_pointwise(True)
    return build_engine(config, place)


def count(model: torch.nn.Module) -> int:
    """Trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def plain(config: Config, batches: list[StepBatch], watch: Watch) -> int:
    """The loop that one would write by hand."""
    torch.manual_seed(config.trainer.seed)
    model = plain_model(config.model)
    if config.model.adapter:
        import peft

        model = peft.get_peft_model(model, lora(config))
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
    cross_entropy = watch.timed("loss", lambda logits, labels: torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum"))

    for batch in batches:
        watch.begin()
        total = 0.0
        for pack in batch.micro_batches:
            # transformers recognises packed documents by positions that restart at 0
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.parallelism.param_dtype == "bfloat16"):
                logits = forward(input_ids=pack.ids[None], position_ids=pack.positions[None], use_cache=False).logits[0]
            loss = cross_entropy(logits, pack.labels) / batch.supervised_tokens
            watch.timed("backward", loss.backward)()
            total += float(loss.detach())
        clip(model.parameters(), config.optimizer.max_grad_norm)
        update()
        optimizer.zero_grad()
        watch.end(total, batch.tokens)
    return count(model)


def plain_model(config):
    """transformers' model with fp32 weights: those of `pretrained`, or random ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from xtuner_hydra.model.families import hf_config

    if config.pretrained:
        return AutoModelForCausalLM.from_pretrained(config.pretrained, dtype="float32", attn_implementation="sdpa").train()
    shape = hf_config(config, "float32", bos_token_id=None, eos_token_id=257)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="sdpa")


def lora(config: Config):
    """peft's adapter of the config's shape."""
    import peft

    ours = config.model.lora
    options = {"r": ours.rank, "lora_alpha": ours.alpha, "lora_dropout": ours.dropout, "target_modules": ours.targets}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)
