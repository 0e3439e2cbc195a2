"""Faults inside a process that trains, on purpose, steered by its environment. The package knows nothing of them.

FAULT=KIND@STEP   what strikes at the beginning of that step (1-based; 0: before the ranks have all met):
                  raise, kill, hang, nan (a gradient), SIGTERM SIGUSR1 SIGINT (to this process, see FAULT_BATCH)
FAULT_RANK=R      on that rank alone; without it on every one
FAULT_BATCH=N     a signal comes with the N-th batch of the step (0-based), of the evaluation after it with FAULT_IN=eval
FAULT_TIMES=N     a signal comes N times in a row
FAULT_ONCE=FILE   not where FILE is there already, which is written as the fault strikes
FILE_LIMIT=BYTES  no file can grow larger
DOCUMENTS=DIR     no fault: DIR/rank-R.jsonl gets a line a step with every document that this rank trains on"""

import hashlib
import json
import os
import resource
import signal
import time
from functools import wraps
from itertools import pairwise
from pathlib import Path


def inject():
    """Arrange for what the environment asks."""
    if "FILE_LIMIT" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_LIMIT"]), resource.RLIM_INFINITY))
    if "FAULT" in os.environ or "DOCUMENTS" in os.environ:
        from xtuner_hydra.trainer import Trainer

        Trainer.__init__ = _before(Trainer.__init__, _at_start)
        Trainer.train = _before(Trainer.train, _at_step)


def _before(function, first):
    @wraps(function)
    def both(*args, **more):
        first(*args)
        return function(*args, **more)

    return both


def _at_start(trainer, *args):
    kind, _, step = os.environ.get("FAULT", "none").partition("@")
    if step == "0" and _is_meant():
        time.sleep(5)  # by then the others wait for it
        FAULTS[kind](trainer, kind)


def _at_step(trainer, batch):
    if "DOCUMENTS" in os.environ:
        _note(batch)
    kind, _, step = os.environ.get("FAULT", "none@0").partition("@")
    if str(batch.step + 1) == step and _is_meant():
        FAULTS.get(kind, _signal)(trainer, kind)


def _is_meant():
    if os.environ.get("FAULT_RANK", _rank()) != _rank():
        return False
    once = os.environ.get("FAULT_ONCE")
    if once and Path(once).exists():
        return False
    if once:
        Path(once).touch()
    return True


def _rank():
    return os.environ.get("RANK", "0")


def _raise(trainer, kind):
    raise RuntimeError("raised on purpose")


def _kill(trainer, kind):
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(trainer, kind):
    while True:
        time.sleep(1)


def _nan(trainer, kind):
    """The first parameter's gradient, this rank's part of it, once all gradients are there: before their norm is taken."""
    import torch

    norm = torch.nn.utils.get_total_norm

    def with_nan(gradients, *args):
        gradients = list(gradients)
        gradients[0].to_local().fill_(float("nan"))
        torch.nn.utils.get_total_norm = norm
        return norm(gradients, *args)

    torch.nn.utils.get_total_norm = with_nan


def _signal(trainer, kind):
    is_training, left = os.environ.get("FAULT_IN") != "eval", int(os.environ.get("FAULT_BATCH", 0))

    def with_batch(model, arguments):
        nonlocal left
        if model.training == is_training:
            for _ in range(int(os.environ.get("FAULT_TIMES", 1)) if left == 0 else 0):
                os.kill(os.getpid(), signal.Signals[kind])
            left -= 1

    trainer.engine.model.register_forward_pre_hook(with_batch)


FAULTS = {"raise": _raise, "kill": _kill, "hang": _hang, "nan": _nan}


def _note(batch):
    documents = []
    for micro in batch.micro_batches:
        edges = micro.cu_seqlens.tolist() if micro.tokens else []
        for start, end in pairwise(edges):
            documents.append(hashlib.sha256(micro.ids[start:end].numpy().tobytes()).hexdigest()[:16])
    line = {"epoch": batch.epoch, "step": batch.step + 1, "documents": documents}
    with open(Path(os.environ["DOCUMENTS"]) / f"rank-{_rank()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
