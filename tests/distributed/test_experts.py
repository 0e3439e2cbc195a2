"""Experts under FSDP on one and two ranks: loss, load-balancing loss, router metrics and gradients are those of transformers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity import document, make_checkpoint, packed_batch, theirs
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor

from xtuner_hydra.build import build_engine
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelismConfig, TrainerConfig
from xtuner_hydra.data.batch import IGNORE
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.parallel.runtime import runtime

LENGTHS = (13, 40, 7, 22)
COEFFICIENT = 0.5  # large, so that its gradient is seen
DOCUMENTS = [document(length, length) for length in LENGTHS]
SUPERVISED = sum(length - 1 for length in LENGTHS)


def batch(numbers):
    """Documents of these numbers in one pack, every token computed."""
    return packed_batch([DOCUMENTS[number] for number in numbers])


GROUPINGS = {  # for each rank its micro-batches, each a list of documents; then the documents whose tokens are in one pool; share recomputed
    "1 rank": ([[[0, 1, 2, 3]]], [[0, 1, 2, 3]], 0.0),
    "another order, recomputed": ([[[3, 1, 0, 2]]], [[0, 1, 2, 3]], 1.0),
    "2 micro-batches": ([[[0, 1, 2], [3]]], [[0, 1, 2], [3]], 0.0),
    "2 ranks": ([[[0, 1]], [[2, 3]]], [[0, 1, 2, 3]], 0.0),
    "2 ranks, recomputed": ([[[1]], [[3, 0, 2]]], [[0, 1, 2, 3]], 1.0),
    "a rank without a pack": ([[[0, 1, 2, 3]], [[]]], [[0, 1, 2, 3]], 0.0),
    "2 ranks, 2 micro-batches": ([[[0], [2]], [[1], [3]]], [[0, 1], [2, 3]], 0.0),
}


def steps_on_a_rank(checkpoint, names):
    """A step of a new engine for each of these groupings."""
    config = Config(
        model=ModelConfig(**read_hf_config(checkpoint), pretrained=str(checkpoint)),
        data=DataConfig(path="unused"),
        parallelism=ParallelismConfig(param_dtype="float32"),
        optimizer=OptimizerConfig(max_grad_norm=1e9),
        trainer=TrainerConfig(device="cpu"),
    )
    with runtime(config) as place:
        return {name: step(config, place, *GROUPINGS[name]) for name in names}


def step(config, place, groups, pools, recompute):
    config.parallelism.recompute_ratio = recompute
    engine = build_engine(config, place)
    engine.optimizers = [Recorder(engine.model)]
    result = engine.train_step([batch(numbers) for numbers in groups[place.rank]], SUPERVISED, lr=0.1)
    experts = [parameter for name, parameter in engine.model.named_parameters() if "experts" in name]
    assert all(isinstance(parameter, DTensor) for parameter in experts)
    held = max(parameter.to_local().shape[0] for parameter in experts)
    more = {name: float(value) for name, value in result.more.items()}
    return SimpleNamespace(loss=float(result.loss), more=more, gradients=engine.optimizers[0].gradients, held=held)


class Recorder:
    """In the optimizer's place: keeps the gradients that it is given."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{}]

    def step(self):
        self.gradients = {name: parameter.grad.full_tensor().clone() for name, parameter in self.model.named_parameters()}

    def zero_grad(self):
        pass


def reference(checkpoint, pools):
    """The same in transformers: each pool of documents one padded batch; the mean over tokens of the pools' load-balancing losses."""
    model = theirs(checkpoint)
    loss, aux, loads, entropies = torch.zeros(()), torch.zeros(()), 0, []
    for pool in pools:
        documents = [DOCUMENTS[number] for number in pool]
        ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in documents], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence([one[1:] for one in documents], batch_first=True, padding_value=IGNORE)
        out = model(ids, attention_mask=mask, output_router_logits=True)
        loss = loss + F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") / SUPERVISED
        aux = aux + out.aux_loss * mask.sum() / sum(LENGTHS)
        probabilities = torch.stack([logits.reshape(*mask.shape, -1)[mask.bool()].softmax(-1) for logits in out.router_logits])
        chosen = probabilities.topk(model.config.num_experts_per_tok, -1).indices
        loads = loads + F.one_hot(chosen, probabilities.shape[-1]).sum((1, 2)).float()
        entropies.append(-(probabilities * probabilities.log()).sum(-1).flatten())
    (loss + COEFFICIENT * aux).backward()
    more = {
        "train/aux_loss": float(aux.detach()),
        "router/max_load": float((loads / loads.mean(1, keepdim=True)).max()),
        "router/entropy": float(torch.cat(entropies).mean().detach()),
    }
    return float(loss.detach()), more, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("experts"), "qwen3_moe", router_aux_loss_coef=COEFFICIENT)


@pytest.fixture(scope="module")
def results(checkpoint):
    """grouping -> what each rank got. Ranks are started once for each number of them."""
    done = {}
    for ranks in (1, 2):
        names = [name for name, (groups, _, _) in GROUPINGS.items() if len(groups) == ranks]
        by_rank = run_on_ranks(steps_on_a_rank, ranks, checkpoint, names)
        done |= {name: [steps[name] for steps in by_rank] for name in names}
    return done


@pytest.mark.parametrize("name", GROUPINGS)
def test_loss_and_gradients_are_those_of_transformers(checkpoint, results, name):
    groups, pools, _ = GROUPINGS[name]
    loss, more, gradients = reference(checkpoint, pools)
    for rank in results[name]:
        assert rank.loss == pytest.approx(loss, rel=1e-5)
        assert rank.more == pytest.approx(more, rel=1e-5)
        assert rank.gradients.keys() == gradients.keys()
        for parameter, expected in gradients.items():
            assert (rank.gradients[parameter] - expected).norm() < 1e-3 * expected.norm(), parameter
        assert rank.held == 6 // len(groups)  # each keeps its part of the experts
