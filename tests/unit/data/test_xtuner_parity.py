"""experiment=xtuner_verification against the log of XTuner V1's published run."""

import json
from pathlib import Path

import pytest
from chats import chat, write_lines

from xtuner_hydra.app import App
from xtuner_hydra.data.loader import step_batch
from xtuner_hydra.launch import prepare
from xtuner_hydra.optim.schedules import learning_rate

PUBLISHED = json.loads((Path(__file__).parent / "xtuner_verification.json").read_text())
OVERHEAD = len("<bos>") - 4 + len("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n")  # BOS is one token
ANSWER = len("<|im_end|>\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The experiment on samples with the published lengths and numbers of labels."""
    directory = tmp_path_factory.mktemp("xtuner")
    samples = []
    for length, supervised in zip(PUBLISHED["sample_lengths"], PUBLISHED["sample_supervised"], strict=True):
        answer = supervised - ANSWER
        samples.append(chat("a" * answer, "q" * (length - OVERHEAD - answer)))
    path = write_lines(directory / "data.jsonl", samples)
    overrides = [
        *("experiment=xtuner_verification", f"data.path={path}", "data.eval_path=null"),
        *(f"data.cache_dir={directory}/cache", f"hydra.run.dir={directory}/run"),
    ]
    with App(overrides) as app:
        return prepare(app.compose(overrides), progress=False)


def test_samples_have_the_published_lengths(prepared):
    cache = prepared.data.train.cache
    assert cache.lengths.tolist() == PUBLISHED["sample_lengths"]
    assert cache.supervised_lengths.tolist() == PUBLISHED["sample_supervised"]


def test_every_step_sees_the_published_number_of_tokens(prepared):
    plan = prepared.data.plan
    steps = [step_batch(plan, step, 0, 1) for step in range(plan.total_steps)]
    assert [step.tokens for step in steps] == [row["text_tokens"] for row in PUBLISHED["log"]]
    assert sum(step.tokens for step in steps) == 52197


def test_the_learning_rate_follows_the_published_column(prepared):
    config = prepared.config
    rates = [
        learning_rate(config.scheduler, step, prepared.data.plan.total_steps, config.optimizer.lr) for step in range(len(PUBLISHED["log"]))
    ]
    assert rates == pytest.approx([row["lr"] for row in PUBLISHED["log"]], abs=5.1e-7)  # logged with six decimals
