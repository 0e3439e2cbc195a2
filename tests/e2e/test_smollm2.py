"""A real model, from its directory through training to what its export answers; transformers is the judge."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chats import write_lines
from conftest import REPOSITORY, CommandLine, read_rows
from parity import same_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner_hydra.config.schema import ModelConfig
from xtuner_hydra.data.loader import step_batch
from xtuner_hydra.data.prepare import PreparedData
from xtuner_hydra.model.families import read_hf_config
from xtuner_hydra.parallel.runtime import param_dtype
from xtuner_hydra.run_dir import read_config

EXAMPLES = REPOSITORY / "xtuner_hydra" / "examples"


@pytest.fixture(scope="module")
def job(smollm2, tmp_path_factory):
    """(run directory, overrides) -> a short run of the experiment on small packs, with four chats held out."""
    cli = CommandLine(tmp_path_factory.mktemp("smollm2"))
    lines = (EXAMPLES / "openai_sft_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    heldout = write_lines(cli.directory / "heldout.jsonl", [json.loads(line) for line in lines[:4]])

    def run(name, *overrides):
        options = [f"model.pretrained={smollm2}", f"data.eval_path={heldout}", "data.pack_max_length=256", "tracking=none"]
        short = ["trainer.eval_interval=-1", "checkpoint.interval=null", f"hydra.run.dir={name}"]
        done = cli("experiment=smollm2_sft", *options, *short, *overrides)
        assert done.code == 0, done.text
        rows = read_rows(cli.directory / name)
        return SimpleNamespace(directory=cli.directory / name, first_loss=rows[0]["train/loss"], eval_loss=rows[-1]["eval/loss"])

    return run


@pytest.fixture(scope="module")
def unmoved(job):
    """A step in fp32 at a learning rate of 0."""
    still = ["optimizer.lr=0", "scheduler.lr_min=0", "trainer.total_steps=1", "trainer.epochs=null"]
    return job("unmoved", *still, "trainer.global_batch_size=1", "parallelism.param_dtype=float32")


@pytest.fixture(scope="module")
def trained(job):
    """Two steps of the experiment, in bf16 where the machine has instructions for it: without them products take minutes."""
    return job("trained", "trainer.total_steps=2", "trainer.epochs=null", "trainer.global_batch_size=1", "checkpoint=none")


def reference_loss(directory, run_dir, dtype):
    """transformers' mean loss on the tokens of a run's first step, document by document."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    data = PreparedData.load(run_dir, read_config(run_dir))
    loss_sum, count = 0.0, 0
    for pack in step_batch(data.plan, 0, dp_rank=0, dp_size=1).micro_batches:
        labels = torch.full((len(pack.ids),), -100)
        labels[pack.rows] = pack.targets
        for first, last in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
            with torch.no_grad():
                logits = model(pack.ids[None, first:last]).logits[0].float()
            loss_sum += float(F.cross_entropy(logits, labels[first:last], reduction="sum"))
        count += len(pack.targets)
    return loss_sum / count


def answer(directory, question):
    """What transformers' greedy generation says."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_directory_is_the_published_model(smollm2):
    from xtuner_hydra.app import App

    with App(["model=smollm2_135m"]) as app:
        published = app.compose(app.overrides).config.model
    read = ModelConfig(**read_hf_config(smollm2))
    published.tokenizer = read.tokenizer
    assert read == published


def test_the_first_loss_in_fp32_is_transformers_own(smollm2, unmoved):
    expected = reference_loss(smollm2, unmoved.directory, torch.float32)
    assert 1 < expected < 6  # it knows the language
    np.testing.assert_allclose(unmoved.first_loss, expected, rtol=1e-5)


@pytest.mark.skipif(param_dtype("auto", "cpu") != "bfloat16", reason="no instructions for bf16")
def test_the_first_loss_in_bf16_is_transformers_own(smollm2, trained):
    np.testing.assert_allclose(trained.first_loss, reference_loss(smollm2, trained.directory, torch.bfloat16), rtol=1e-2)


def test_a_step_at_no_learning_rate_leaves_every_bit(smollm2, unmoved):
    same_files(smollm2, unmoved.directory / "hf" / "latest")


def test_the_export_knows_the_capital_of_france(unmoved):
    assert "Paris" in answer(unmoved.directory / "hf" / "latest", "What is the capital of France?")


def test_the_evaluation_loss_falls(unmoved, trained):
    assert trained.eval_loss < unmoved.eval_loss - 0.05
