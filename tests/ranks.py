"""Run a function on real gloo ranks, one thread each."""

import os
import pickle
import socket
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.multiprocessing as mp


def run_on_ranks(function, ranks, *args):
    """`function(*args)` on `ranks` processes with the variables torchrun sets; the list of what they return, by rank.

    An exception on a rank fails the caller with that rank's traceback."""
    with TemporaryDirectory() as directory, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_rank, (ranks, port, directory, function, args), nprocs=ranks)
        results = [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(ranks)]
    for rank, (error, _) in enumerate(results):
        assert error is None, f"rank {rank}:\n{error}"
    return [result for _, result in results]


def _rank(rank, ranks, port, directory, function, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        outcome = (None, function(*args))
    except Exception:
        outcome = (traceback.format_exc(), None)
    (Path(directory) / str(rank)).write_bytes(pickle.dumps(outcome))
