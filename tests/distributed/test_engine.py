"""One loss and one set of gradients, however a step's documents are spread over ranks, micro-batches and packs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import TINY, run_on_ranks
from torch.distributed.tensor import DTensor

from xtuner_hydra.build import build_engine
from xtuner_hydra.config.schema import Config, DataConfig, OptimizerConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.data.batch import deal, empty_batch, make_batch
from xtuner_hydra.data.packing import Packs
from xtuner_hydra.model.init import initialise
from xtuner_hydra.model.transformer import CausalLM
from xtuner_hydra.parallel.runtime import runtime

CONFIG = Config(
    model=TINY,
    data=DataConfig(path="unused"),
    parallelism=ParallelismConfig(param_dtype="float32"),
    optimizer=OptimizerConfig(max_grad_norm=1e9),
    trainer=TrainerConfig(seed=3, device="cpu"),
)
LENGTHS = (13, 40, 7, 22)


class Documents:
    """Four documents as a token cache has them; the assistant speaks from a third of each on, except in those named silent."""

    def __init__(self, silent=()):
        rng = np.random.default_rng(0)
        self._ids = [rng.integers(0, 97, length).astype(np.uint16) for length in LENGTHS]
        self._supervised = [np.arange(length) >= (length if i in silent else length // 3) for i, length in enumerate(LENGTHS)]

    def ids(self, document):
        return self._ids[document]

    def supervised(self, document):
        return self._supervised[document]


class Recorder:
    """In the optimizer's place: keeps the gradients that it is given."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{}]

    def step(self):
        self.gradients = {name: parameter.grad.full_tensor().clone() for name, parameter in self.model.named_parameters()}

    def zero_grad(self):
        pass


def packed(groups):
    documents = np.array([document for group in groups for document in group])
    stop = np.array([LENGTHS[document] for document in documents])
    return Packs(documents, np.zeros_like(stop), stop, np.cumsum([0, *map(len, groups)]))


def step_on_a_rank(groups, silent):
    documents, packs = Documents(silent), packed(groups)
    with runtime(CONFIG) as place:
        engine = build_engine(CONFIG, place)
        engine.optimizers = [Recorder(engine.model)]
        mine = deal(packs.lengths, place.world_size)[place.rank]
        batches = [empty_batch() if pack is None else make_batch(documents, packs, pack) for pack in mine]
        result = engine.train_step(batches, supervised(documents), lr=0.1)
        sharded = all(isinstance(parameter, DTensor) for parameter in engine.model.parameters())
        return SimpleNamespace(loss=float(result.loss), norm=result.grad_norm, gradients=engine.optimizers[0].gradients, sharded=sharded)


def supervised(documents):
    return int(sum(documents.supervised(i)[1:].sum() for i in range(4)))


def reference(silent):
    """The same by hand: plain model, one document at a time, cross-entropy of all logits."""
    model, documents = CausalLM(CONFIG.model), Documents(silent)
    initialise(model, 3)
    total = torch.zeros(())
    for i, length in enumerate(LENGTHS):
        ids = torch.from_numpy(documents.ids(i).astype(np.int64))
        labels = ids.where(torch.from_numpy(documents.supervised(i)), -100)[1:]
        logits = model(ids[:-1], torch.arange(length - 1), torch.tensor([0, length - 1], dtype=torch.int32), length - 1)
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    loss = total / supervised(documents)
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "groups", "silent"),
    [
        pytest.param(1, [[0], [1], [2], [3]], (), id="1 rank, 4 micro-batches"),
        pytest.param(2, [[0], [1], [2], [3]], (), id="2 ranks, 2 micro-batches"),
        pytest.param(2, [[0, 1], [2, 3]], (), id="2 ranks, 1 micro-batch"),
        pytest.param(2, [[0, 2, 3], [1]], (1,), id="a rank without a supervised token"),
        pytest.param(2, [[0, 1, 2, 3]], (), id="a rank without a pack"),
    ],
)
def test_loss_and_gradients_are_those_of_documents_taken_one_by_one(ranks, groups, silent):
    loss, gradients = reference(silent)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    for rank in run_on_ranks(step_on_a_rank, ranks, groups, silent):
        assert rank.sharded  # at world size 1 too
        assert rank.loss == pytest.approx(loss, rel=1e-6)
        assert rank.norm == pytest.approx(norm, rel=1e-5)
        for name, expected in gradients.items():
            torch.testing.assert_close(rank.gradients[name], expected, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
