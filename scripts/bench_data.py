"""The data pipeline, measured on generated data in a temporary directory and compared with its targets.

    python scripts/bench_data.py [--of bytes,tokenizer,packing,start,waiting,balance] [--rounds 3] [--samples 1000000] [--out scripts/results/NAME]

bytes      MB of a file that one core turns into a token cache per second with the byte tokenizer, reading and writing included; texts, chats
tokenizer  a BPE trained here: tokens per second on one core, from the file's bytes to ids and labels, relative to the library's `encode_batch`
           on the same texts (chats: to transformers' rendering and `encode_batch`, and to `encode_batch` on texts rendered before)
packing    best fit of `--samples` log-normal lengths into 4,096-token packs
start      opening, checking and planning a cached set of `--samples` short chats; then what a worker does until it has its first batch
waiting    share of a 0.1 s step spent waiting for its batch of 8 packs of 2,048 tokens
balance    64 packs per step dealt to 8 ranks: the heaviest rank's work above the mean, over the steps of an epoch

Each is measured in its own process; of several rounds the best counts, as other load can only make it worse."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

Figures = dict[str, float]

# what is measured: (unit, target, whether more is better)
TARGETS: dict[str, tuple[str, float | None, bool]] = {
    "byte tokenizer, texts": ("MB/s, 1 core", 20, True),
    "byte tokenizer, chats": ("MB/s, 1 core", 20, True),
    "BPE, texts, of encode_batch": ("x", 1, True),
    "BPE, chats, of rendering and encode_batch": ("x", 1, True),
    "BPE, chats, of encode_batch alone": ("x", None, True),
    "packing": ("s", 2, False),
    "packs' utilisation": ("%", 99.9, True),
    "start on a cached set": ("s", 3, False),
    "start, peak memory": ("MB", 300, False),
    "worker's start to the first batch": ("s", None, False),
    "worker's start, peak memory": ("MB", None, False),
    "waiting for data": ("% of a step", 1, False),
    "making a batch": ("ms per pack", None, False),
    "imbalance of work, mean": ("%", 3, False),
    "imbalance of work, worst step": ("%", 3, False),
    "imbalance of tokens, worst step": ("%", 3, False),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default=",".join(MEASURES), help="what to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples for packing and start")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, directory = args.measure
        print(json.dumps(MEASURES[name](Path(directory), args.samples)))
        return
    if strangers := set(args.of.split(",")) - set(MEASURES):
        parser.error(f"--of: there is no {', '.join(sorted(strangers))}")
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in args.of.split(","):
            if name in PREPARATIONS:
                PREPARATIONS[name](Path(directory), args.samples)
            for _ in range(args.rounds):
                for what, value in in_own_process(name, directory, args.samples).items():
                    results.setdefault(what, []).append(value)
    print(table(results))
    if args.out:
        save(args.out, results)


def in_own_process(name: str, directory: str, samples: int) -> Figures:
    command = [sys.executable, __file__, "--measure", name, directory, "--samples", str(samples)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def bytes_(directory: Path, samples: int) -> Figures:
    """A cache of texts and one of chats, by one process."""
    from xtuner_hydra.data.tokenizers import ByteTokenizer

    figures = {}
    for kind, file in (("texts", directory / "texts.jsonl"), ("chats", directory / "chats.jsonl")):
        started = time.process_time()
        build(file, ByteTokenizer(), directory / "cache", workers=0)
        figures[f"byte tokenizer, {kind}"] = file.stat().st_size / 1e6 / (time.process_time() - started)
        shutil.rmtree(directory / "cache")
    return figures


def tokenizer(directory: Path, samples: int) -> Figures:
    """Ours and the library's, in turn, on the same samples."""
    from transformers import AutoTokenizer

    from xtuner_hydra.data.hf_tokenizer import HFTokenizer
    from xtuner_hydra.data.readers import Part, split
    from xtuner_hydra.data.tokenising import Recipe, Task, tokenize

    ours, theirs = HFTokenizer(directory / "bpe", "bpe"), AutoTokenizer.from_pretrained(directory / "bpe")
    figures = {}
    for kind, format in (("texts", "text"), ("chats", "openai")):
        file = directory / f"{kind}.jsonl"
        part: Part = next(split(file, 8 << 20))
        records = [json.loads(line) for line in file.read_bytes()[: part.stop].splitlines()]
        our_time, made = timed(lambda p=part, f=format: tokenize(Recipe(f, ours, skip=False), Task(0, p)))
        if kind == "chats":
            chats = [record["messages"] for record in records]
            rendering, texts = timed(lambda c=chats: theirs.apply_chat_template(c, tokenize=False))
        else:
            rendering, texts = 0.0, [record["text"] for record in records]
        encoding, encoded = timed(lambda t=texts: theirs.backend_tokenizer.encode_batch(t, add_special_tokens=False))
        extra = len(texts) if kind == "texts" else 0  # the EOS token of each
        assert len(made.ids) - extra == sum(map(len, encoded)), "ours and the library's tokens differ"
        if kind == "texts":
            figures["BPE, texts, of encode_batch"] = encoding / our_time
        else:
            figures["BPE, chats, of rendering and encode_batch"] = (rendering + encoding) / our_time
            figures["BPE, chats, of encode_batch alone"] = encoding / our_time
    return figures


def packing(directory: Path, samples: int) -> Figures:
    from xtuner_hydra.data.packing import best_fit

    sizes, started = lengths(samples, 4096), time.perf_counter()
    packs = best_fit(sizes, 4096, np.random.default_rng(1))
    seconds = time.perf_counter() - started
    return {"packing": seconds, "packs' utilisation": 100 * sizes.sum() / (len(packs) * 4096)}


def start(directory: Path, samples: int) -> Figures:
    """What the Hydra process does on a warm cache, imports of the data's code included, then a worker's part."""
    started = time.perf_counter()
    from xtuner_hydra.data.prepare import PreparedData, prepare
    from xtuner_hydra.data.tokenizers import ByteTokenizer

    config = start_config(directory)
    data = prepare(config, ByteTokenizer(), progress=False)
    seconds, peak = time.perf_counter() - started, peak_mb()
    data.save(directory)
    del data
    from xtuner_hydra.data.loader import train_batches  # imports torch, which a worker has in any case

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started = time.perf_counter()
    loaded = PreparedData.load(directory, config)
    batches = train_batches(loaded.plan, start_step=0, dp_rank=0, dp_size=1)
    next(batches)
    worker = time.perf_counter() - started
    batches.close()
    return {
        "start on a cached set": seconds,
        "start, peak memory": peak,
        "worker's start to the first batch": worker,
        "worker's start, peak memory": peak_mb(),
    }


def waiting(directory: Path, samples: int) -> Figures:
    """Steps of 0.1 s of matrix products, with which the thread that makes batches has to share a core."""
    import torch

    from xtuner_hydra.data.loader import step_batch, train_batches
    from xtuner_hydra.data.tokenizers import ByteTokenizer

    cache = build(directory / "chats.jsonl", ByteTokenizer(), directory / "waiting", workers=0)
    plan = plan_of(cache, pack_max_length=2048, global_batch_size=8)
    matrix, waited, steps = torch.randn(512, 512), 0.0, 40
    batches = train_batches(plan, start_step=0, dp_rank=0, dp_size=1)
    next(batches)
    for _ in range(steps):
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            matrix @ matrix
        started = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - started
    batches.close()
    making, _ = timed(lambda: [step_batch(plan, step, 0, 1) for step in range(steps)])
    return {"waiting for data": 100 * waited / (steps * 0.1 + waited), "making a batch": 1e3 * making / (8 * steps)}


def balance(directory: Path, samples: int) -> Figures:
    """Steps of 64 packs of 4,096 tokens on 8 ranks; the last step of the epoch, which is short, apart."""
    from xtuner_hydra.data.batch import deal
    from xtuner_hydra.data.packing import best_fit
    from xtuner_hydra.data.plan import work

    packs = best_fit(lengths(300_000, 4096), 4096, np.random.default_rng(1))
    costs, tokens, above = work(packs), packs.lengths, {"work": [], "tokens": []}
    for first in range(0, len(packs) // 64 * 64, 64):
        ranks = deal(costs[first : first + 64], 8)
        for name, values in (("work", costs), ("tokens", tokens)):
            sums = np.array([sum(values[first + pack] for pack in rank if pack is not None) for rank in ranks])
            above[name].append(100 * (sums.max() / sums.mean() - 1))
    return {
        "imbalance of work, mean": float(np.mean(above["work"])),
        "imbalance of work, worst step": float(np.max(above["work"])),
        "imbalance of tokens, worst step": float(np.max(above["tokens"])),
    }


MEASURES: dict[str, Callable[[Path, int], Figures]] = {
    "bytes": bytes_,
    "tokenizer": tokenizer,
    "packing": packing,
    "start": start,
    "waiting": waiting,
    "balance": balance,
}


def write_corpus(directory: Path, samples: int) -> None:
    """texts.jsonl and chats.jsonl, 32 MB each."""
    for name, record in (("texts.jsonl", text_record), ("chats.jsonl", chat_record)):
        if not (directory / name).exists():
            write_lines(directory / name, record(), size=32 << 20)


def write_tokenizer(directory: Path, samples: int) -> None:
    """A byte-level BPE of 8,000 ids with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    write_corpus(directory, samples)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with (directory / "texts.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(2000), strict=False)]
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    (directory / "bpe").mkdir()
    bpe.save(str(directory / "bpe" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0], "chat_template": CHAT_TEMPLATE}
    (directory / "bpe" / "tokenizer_config.json").write_text(json.dumps(config))


def write_cached_set(directory: Path, samples: int) -> None:
    """many.jsonl and its token cache."""
    from xtuner_hydra.data.tokenizers import ByteTokenizer

    write_lines(directory / "many.jsonl", chat_record(median=80), count=samples)
    build(directory / "many.jsonl", ByteTokenizer(), directory / "many", workers=None)


PREPARATIONS: dict[str, Callable[[Path, int], None]] = {
    "bytes": write_corpus,
    "tokenizer": write_tokenizer,
    "start": write_cached_set,
    "waiting": write_corpus,
}


def text_record() -> Iterator[dict[str, Any]]:
    words = Words()
    while True:
        yield {"text": words.text(1500)}


def chat_record(median: int = 300) -> Iterator[dict[str, Any]]:
    words = Words()
    while True:
        turns = ("user", words.text(median // 2)), ("assistant", words.text(median))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


class Words:
    """Texts of log-normal length, cut from one long text of words with Zipf's frequencies."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        vocabulary = ["".join(self.random.choice(list("etaoinshrdlucmfw"), size)) for size in self.random.integers(2, 11, 5000)]
        self.whole = " ".join(vocabulary[number % 5000] for number in self.random.zipf(1.3, 1_000_000))

    def text(self, median: float) -> str:
        size = min(int(self.random.lognormal(np.log(median), 1)) + 1, 100_000)
        begin = int(self.random.integers(len(self.whole) - size))
        return self.whole[begin : begin + size]


def write_lines(file: Path, records: Iterator[dict[str, Any]], size: int | None = None, count: int | None = None) -> None:
    with file.open("w") as stream:
        for number, record in enumerate(records):
            if number == count or (size is not None and stream.tell() > size):
                return
            stream.write(json.dumps(record) + "\n")


def lengths(count: int, capacity: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(5.5, 1, count), 2, capacity).astype(np.int64)


def build(file: Path, tokenizer: Any, cache_dir: Path, workers: int | None):
    from xtuner_hydra.data.cache import build_cache

    format = "text" if file.name.startswith("texts") else "openai"
    return build_cache([file], format, tokenizer, bad_lines="error", cache_dir=cache_dir, num_workers=workers, progress=False)


def plan_of(cache, pack_max_length: int, global_batch_size: int):
    from xtuner_hydra.config.schema import DataConfig, TrainerConfig
    from xtuner_hydra.data.plan import TrainPlan, select_samples, training_limit

    data = DataConfig(path="generated", pack_max_length=pack_max_length)
    trainer = TrainerConfig(epochs=1, global_batch_size=global_batch_size)
    selection = select_samples(cache, data, training_limit(data), seed=trainer.seed, sample_ratio=1.0, key="data.path")
    return TrainPlan(cache, selection, data, trainer)


def start_config(directory: Path):
    """A config with only the data set."""
    from xtuner_hydra.config.schema import Config, DataConfig, TrainerConfig

    data = DataConfig(path=str(directory / "many.jsonl"), cache_dir=str(directory / "many"))
    return Config(data=data, trainer=TrainerConfig(epochs=1, global_batch_size=8))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds of this process's CPU, what `function` gives)."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def peak_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def best(what: str, values: list[float]) -> float:
    return max(values) if TARGETS[what][2] else min(values)


def table(results: dict[str, list[float]]) -> str:
    """What, measured (best of the rounds), target."""
    lines = [f"{'':<44}{'measured':>12}{'target':>12}"]
    for what, values in results.items():
        unit, target, more = TARGETS[what]
        value = best(what, values)
        reached = "" if target is None else "reached" if (value >= target if more else value <= target) else "MISSED"
        aim = "" if target is None else f"{'>=' if more else '<='} {target:g}"
        lines.append(f"{what:<44}{value:>12.2f}{aim:>12}  {unit:<13}{reached}")
    return "\n".join(lines)


def save(out: Path, results: dict[str, list[float]]) -> None:
    """OUT.json: every round, with date, machine, versions, commit."""
    from importlib.metadata import version

    out.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    about = {"date": datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv), "commit": commit, "cores": os.cpu_count()}
    about |= {"machine": platform.platform(), "python": platform.python_version(), "load": os.getloadavg()}
    about |= {name: version(name) for name in ("torch", "numpy", "tokenizers", "transformers")}
    rows = {what: {"unit": TARGETS[what][0], "target": TARGETS[what][1], "best": best(what, v), "rounds": v} for what, v in results.items()}
    out.with_suffix(".json").write_text(json.dumps({**about, "results": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
