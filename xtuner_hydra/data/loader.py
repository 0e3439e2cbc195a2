"""From the plan to this rank's batches, made ahead by a thread so that a step does not wait for its data."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from xtuner_hydra.config.schema import Config
from xtuner_hydra.data.batch import PackedBatch, deal, empty_batch, make_batch
from xtuner_hydra.data.mixture import Samples
from xtuner_hydra.data.plan import Selection, TrainPlan, eval_packs, work

AHEAD = 2
"""Steps that are made before they are asked for."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a step, and what all ranks know of the whole step without talking to each other.

    micro_batches: this rank's, as many on every rank. step: 0-based. tokens, supervised_tokens, packs: of all ranks.
    utilization: share of the packs that holds tokens. samples: the step's sample numbers, to find them when something is wrong with one."""

    micro_batches: list[PackedBatch]
    epoch: int
    step: int
    tokens: int
    supervised_tokens: int
    packs: int
    utilization: float
    samples: list[int]


def train_batches(plan: TrainPlan, *, start_step: int, dp_rank: int, dp_size: int) -> Generator[StepBatch]:
    """The steps from `start_step` to the plan's last, for rank `dp_rank` of `dp_size`. Closing the generator ends its thread."""
    steps: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=AHEAD)
    stopped = threading.Event()

    def put(item: StepBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return steps.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for step in range(start_step, plan.total_steps):
                if stopped.is_set():
                    return
                put(step_batch(plan, step, dp_rank, dp_size))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while (item := steps.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def step_batch(plan: TrainPlan, step: int, dp_rank: int, dp_size: int) -> StepBatch:
    """Rank `dp_rank`'s part of 0-based `step`."""
    number, members = plan.locate(step)
    epoch = plan.epoch(number)
    these = slice(members.start, members.stop)
    tokens = int(epoch.tokens[these].sum())
    segments = slice(epoch.packs.offsets[members.start], epoch.packs.offsets[members.stop])
    mine = deal(epoch.work[these], dp_size)[dp_rank]
    return StepBatch(
        micro_batches=[empty_batch() if pack is None else make_batch(plan.cache, epoch.packs, members[pack]) for pack in mine],
        epoch=number,
        step=step,
        tokens=tokens,
        supervised_tokens=int(epoch.supervised_tokens[these].sum()),
        packs=len(members),
        utilization=(tokens + len(members)) / (len(members) * plan.data.pack_max_length),
        samples=epoch.packs.sample[segments].tolist(),
    )


def eval_batches(cache: Samples, selection: Selection, config: Config, *, dp_rank: int, dp_size: int) -> Iterator[PackedBatch]:
    """The held-out samples once, as this rank's share; every rank gets equally many batches."""
    packs = eval_packs(selection, config.data, config.model.max_position_embeddings)
    for pack in deal(work(packs), dp_size)[dp_rank]:
        yield empty_batch() if pack is None else make_batch(cache, packs, pack)
