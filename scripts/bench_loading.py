"""How much memory and time a rank needs to read its part of a checkpoint: ours compared with reading all of it on every rank.

    python scripts/bench_loading.py [--ranks 2] [--model qwen2_5_0p5b]

Makes a bfloat16 checkpoint of random weights of that size in a temporary directory (several files), then loads it on gloo ranks, sharded and
kept in fp32. Peak: growth of resident memory while loading, beyond the empty model; file pages that were read count too, though the
system can drop them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("ours", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="qwen2_5_0p5b", help="an option of the model group")
    args = parser.parse_args()
    from xtuner_hydra.app import App

    overrides = [f"model={args.model}", "trainer.device=cpu", "parallelism.param_dtype=float32"]
    with App(overrides) as app, tempfile.TemporaryDirectory() as directory:
        config = app.compose(overrides).config
        config.model.pretrained = directory
        size = write_checkpoint(config, Path(directory))
        print(f"{args.model}: {size / 1e9:.2f} GB of weights in {len(list(Path(directory).glob('*.safetensors')))} files")
        for contender in CONTENDERS:
            for rank, line in enumerate(on_ranks(args.ranks, config, contender)):
                print(f"{contender:<6} rank {rank}: {line}")


def write_checkpoint(config, directory: Path) -> int:
    """A random checkpoint of the config's shape; its size in bytes."""
    import torch

    from xtuner_hydra.checkpoint.export import write_weights
    from xtuner_hydra.files import write_json
    from xtuner_hydra.model.families import family_of, hf_config
    from xtuner_hydra.model.transformer import CausalLM
    from xtuner_hydra.parallel.runtime import runtime

    with torch.device("meta"):
        model = CausalLM(config.model)
    pieces = family_of(config.model).pieces

    def tensors():
        for name, parameter in model.named_parameters():
            for piece, index in pieces(name, tuple(parameter.shape)):
                yield piece, torch.randn(parameter[index].shape, dtype=torch.bfloat16)

    with runtime(config):
        write_weights(directory, tensors(), 200_000_000)
    write_json(directory / "config.json", hf_config(config.model, "bfloat16", bos_token_id=None, eos_token_id=None))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def on_ranks(ranks: int, config, contender: str) -> list[str]:
    """Each rank's report, by rank."""
    import torch.distributed as dist
    import torch.multiprocessing as mp

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(load, (ranks, store.port, directory, config, contender), nprocs=ranks)
        return [(Path(directory) / str(rank)).read_text() for rank in range(ranks)]


def load(rank: int, ranks: int, port: int, directory: str, config, contender: str) -> None:
    """Build the sharded model and fill it, measured."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    import torch

    from xtuner_hydra.model.init import initialise
    from xtuner_hydra.model.pretrained import load_pretrained
    from xtuner_hydra.model.transformer import CausalLM
    from xtuner_hydra.parallel.runtime import runtime
    from xtuner_hydra.parallel.sharding import parallelize

    with runtime(config) as place:
        with torch.device("meta"):
            model = CausalLM(config.model)
        parallelize(model, config.parallelism, place)
        model.to_empty(device=place.device)
        initialise(model, 0)  # so that its pages are resident before the measurement
        kept = sum(parameter.to_local().nbytes for parameter in model.parameters())
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, started = memory("VmRSS"), time.perf_counter()
        if contender == "ours":
            load_pretrained(model, config.model.pretrained)
        else:
            read_whole(model, Path(config.model.pretrained))
        seconds, peak = time.perf_counter() - started, memory("VmHWM") - before
        (Path(directory) / str(rank)).write_text(f"keeps {kept / 1e9:.2f} GB, peak {peak / 1e9:+.2f} GB, {seconds:.1f} s")


def read_whole(model, directory: Path) -> None:
    """The obvious way: every file in memory, then each parameter's part copied out of it."""
    from safetensors.torch import load_file

    from xtuner_hydra.model.init import assign

    weights = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, parameter in model.named_parameters():
        assign(parameter, weights[name].float())


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
