"""Run a function on real gloo ranks, one thread each, in forks that have imported torch (forks.py)."""

import os
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forks import serve

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.errors import leave

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tokenizer="byte",
)


def run_on_ranks(function, ranks, *args):
    """`function(*args)` on `ranks` processes with the variables torchrun sets; the list of what they return, by rank.

    An exception on a rank ends the others and fails the caller with that rank's traceback."""
    serve()
    # the store listens before the ranks start, on a port of its own choice, as torchrun's does: a port that was free a moment ago may not be now
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as directory:
        arguments = (ranks, store.port, directory, dict(os.environ), function, args)
        mp.start_processes(_rank, arguments, nprocs=ranks, start_method="forkserver")
        return [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(ranks)]


def _rank(rank, ranks, port, directory, environment, function, args):
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    torch.set_num_threads(1)
    (Path(directory) / str(rank)).write_bytes(pickle.dumps(function(*args)))
    leave(0)
