"""Generation against transformers and against itself without a cache."""

import pytest
import torch
from parity import CASES, document, make_checkpoint, ours, pack, theirs
from transformers import TopPLogitsWarper

from xtuner_hydra.model.generation import generate, greedy, sampler

PROMPT, MOST = 30, 40  # past the window of every case


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """case -> its directory, made once."""
    made = {}

    def directory(case):
        if case not in made:
            made[case] = make_checkpoint(tmp_path_factory.mktemp(case.replace(" ", "_")), case)
        return made[case]

    return directory


def answer(model, prompt, stop=(), choose=greedy, most=MOST):
    return list(generate(model, prompt.tolist(), most=most, stop=stop, choose=choose))


@pytest.mark.parametrize("case", CASES)
def test_greedy_is_what_transformers_generates(checkpoint, case):
    prompt = document(PROMPT, 4)
    expected = theirs(checkpoint(case)).generate(prompt[None], max_new_tokens=MOST, do_sample=False, eos_token_id=-1)[0, PROMPT:]
    assert len(expected.unique()) > 5, "too dull to show a fault"
    assert answer(ours(checkpoint(case)), prompt) == expected.tolist()


@pytest.mark.parametrize("case", ["llama 3.2", "mistral", "qwen2 window", "qwen3", "qwen3_moe mixed"])
@pytest.mark.parametrize("length", [1, PROMPT])
def test_the_cache_changes_nothing(checkpoint, case, length):
    model, ids = ours(checkpoint(case)), document(length, 5)
    with torch.no_grad():
        for _ in range(MOST):
            ids = torch.cat([ids, model(*pack([ids]))[-1].argmax()[None]])
    assert answer(model, ids[:length]) == ids[length:].tolist()


def test_a_token_that_ends_the_answer_is_left_out_as_in_transformers_but_for_that_token(checkpoint):
    model, prompt = ours(checkpoint("qwen3")), document(PROMPT, 4)
    whole = answer(model, prompt)
    end = whole[7]
    expected = theirs(checkpoint("qwen3")).generate(prompt[None], max_new_tokens=MOST, do_sample=False, eos_token_id=end)[0, PROMPT:]
    assert [*answer(model, prompt, stop={end}), end] == expected.tolist()
    assert answer(model, prompt, most=3) == whole[:3]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_drawn_are_the_tokens_that_transformers_keeps_as_often_as_it_would(top_p):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 2
    kept = TopPLogitsWarper(top_p)(None, logits[None] / 0.7)[0] if top_p < 1 else logits / 0.7
    choose, draws = sampler(0.7, top_p, 3), 4000
    counts = torch.bincount(torch.stack([choose(logits) for _ in range(draws)]), minlength=20)
    expected = kept.softmax(0)
    assert not counts[expected == 0].any()
    often = expected * draws > 20  # or the number of draws is not near enough to normally distributed
    assert often.sum() > (1 if top_p > 0.1 else 0)
    assert ((counts / draws - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt())[often].all()


@pytest.mark.parametrize("temperature", [1e-310, 1e-30])
def test_next_to_no_temperature_is_the_likeliest(temperature):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 2
    assert sampler(temperature, 1.0, 3)(logits) == logits.argmax()


def test_a_seed_repeats_an_answer_and_another_one_does_not(checkpoint):
    model, prompt = ours(checkpoint("qwen3")), document(PROMPT, 4)
    before = torch.get_rng_state()
    one, again, other = (answer(model, prompt, choose=sampler(2.0, 0.95, seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)
