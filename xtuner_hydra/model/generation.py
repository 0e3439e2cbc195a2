"""Generation: a prompt -> the tokens with which the model continues it, one at a time.

The prompt goes through the decoder once, with the same attention as in training; its keys and values stay in one cache per layer, so that every
further token costs one row. Memory of the cache: 2 x layers x kv_heads x head_dim numbers per token."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor

from xtuner_hydra.model.attention import Cache
from xtuner_hydra.model.transformer import CausalLM

Choose = Callable[[Tensor], Tensor]
"""Logits of the next token, (vocab,) fp32 -> its id, scalar int64."""


@torch.no_grad()
def generate(model: CausalLM, prompt: Sequence[int], *, most: int, stop: Container[int], choose: Choose) -> Iterator[int]:
    """Up to `most` ids that follow `prompt` (at least one id), each as soon as it is known; one in `stop` ends them and is left out.

    Under FSDP it is collective: `choose` must give the same on all ranks."""
    device = next(model.parameters()).device
    caches = [Cache(len(prompt) + most) for _ in range(model.config.num_hidden_layers)]
    ids, start = torch.tensor(prompt, dtype=torch.int64, device=device), 0
    for _ in range(most):
        chosen = choose(_next_logits(model, ids, start, caches))
        if (token := int(chosen)) in stop:
            return
        yield token
        start += len(ids)
        ids = torch.tensor([token], device=device)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token, the first of equals."""
    return logits.argmax()


def sampler(temperature: float, top_p: float, seed: int | None) -> Choose:
    """Draws from softmax(logits / temperature), cut to the fewest tokens whose probabilities sum to `top_p` or more (Holtzman et al. 2020).

    temperature: above 0; top_p: above 0, 1 = all tokens. It has its own generator, on the CPU; seed None: a different one each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        logits = logits.double().cpu()
        # the largest becomes 0, which no temperature can make infinite
        probabilities, ids = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(0) - probabilities
        kept = probabilities.where(before < top_p, 0.0)
        return ids[torch.multinomial(kept, 1, generator=generator)[0]]

    return choose


def _next_logits(model: CausalLM, ids: Tensor, start: int, caches: Sequence[Cache]) -> Tensor:
    """Logits after `ids`, the first of which has position `start`, (vocab,)."""
    count = len(ids)
    positions = torch.arange(start, start + count, device=ids.device)
    bounds = torch.tensor([0, count], dtype=torch.int32, device=ids.device)
    last = torch.tensor([count - 1], device=ids.device)
    logits: Tensor = model(ids, positions, bounds, count, rows=last, caches=caches)
    return logits[0]
