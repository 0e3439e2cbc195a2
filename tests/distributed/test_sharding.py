"""What FSDP is asked not to do: copy at world size 1, keep or gather what no backward pass needs."""

import pytest
import torch
from ranks import TINY, run_on_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner_hydra.build import build_engine
from xtuner_hydra.config.schema import Config, DataConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.parallel.runtime import runtime

CONFIG = Config(
    model=TINY,
    data=DataConfig(path="unused"),
    parallelism=ParallelismConfig(param_dtype="float32"),
    trainer=TrainerConfig(seed=3, device="cpu"),
)


def loss_of(model):
    """Of one document of 40 tokens."""
    ids, positions = torch.arange(1, 41), torch.arange(40)
    return model(ids, positions, torch.tensor([0, 40], dtype=torch.int32), 40, rows=positions, targets=ids + 1)


class Copies(TorchDispatchMode):
    """Counts the elements that FSDP copies, which are those of flat tensors."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and args[0] is not args[1] and args[0].ndim == 1:
            self.elements += args[0].numel()
        return function(*args, **(kwargs or {}))


def copied():
    with runtime(CONFIG) as place:
        model = build_engine(CONFIG, place).model
        with Copies() as copies:
            loss_of(model).backward()
        return copies.elements, sum(parameter.numel() for parameter in model.parameters())


def test_one_rank_copies_weights_to_gather_them_and_no_gradients_to_reduce_them():
    [(elements, parameters)] = run_on_ranks(copied, 1)
    assert elements == parameters


def where_the_embedding_is(training):
    with runtime(CONFIG) as place:
        model = build_engine(CONFIG, place).model.train(training)
        loss = loss_of(model)
        after_forward = isinstance(model.model.embed_tokens.weight, DTensor)
        loss.backward()
        gradient = model.model.embed_tokens.weight.grad.full_tensor()
        return after_forward, gradient.count_nonzero().item() > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_embedding_is_freed_after_its_forward_pass_where_a_backward_pass_follows(ranks):
    assert run_on_ranks(where_the_embedding_is, ranks, True) == [(True, True)] * ranks
    assert run_on_ranks(where_the_embedding_is, ranks, False) == [(False, True)] * ranks
