"""What a run leaves is used: its samples, chat, evaluate, export; with transformers as the judge of what is said."""

import json
import re
import shutil
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import wandb_file
from checkpoints import flip_bit
from conftest import CommandLine, read_rows
from parity import tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner_hydra.__main__ import main
from xtuner_hydra.data.tokenizers import ByteTokenizer

PROMPTS = ["What is the capital of France?", "Wie heißt du, „Hydra“?"]
JOB = (
    *("debug=fast", "trainer.total_steps=4", "trainer.eval_interval=2", "checkpoint.interval=2", "checkpoint.hf_interval=4"),
    *("parallelism.param_dtype=float32", "optimizer.lr=1e-2", "tracking.tensorboard=false"),
)
SAMPLED = (f"trainer.sample_prompts={json.dumps(PROMPTS, ensure_ascii=False)}", "trainer.sample_tokens=24")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run with samples."""
    cli = CommandLine(tmp_path_factory.mktemp("use"))
    done = cli(*JOB, *SAMPLED, "hydra.run.dir=run")
    assert done.code == 0, done.text
    return SimpleNamespace(cli=cli, run=cli.directory / "run", out=done.out)


@pytest.fixture(scope="module")
def trained_on(job):
    """(number of ranks, options) -> the directory of such a run, made once."""

    @cache
    def run(ranks, *options):
        directory = job.cli.directory / f"{ranks}-{len(options)}"
        spread = (f"parallelism.nproc_per_node={ranks}", f"trainer.global_batch_size={ranks}", "tracking.wandb.enabled=false")
        done = job.cli(*JOB, *options, *spread, f"hydra.run.dir={directory}")
        assert done.code == 0, done.text
        return directory

    return run


def read_samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def said_by_transformers(directory, question, most):
    """A greedy answer by transformers alone: its loader, its tokenizer, its template, its generation."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**asked, max_new_tokens=most, do_sample=False)[0, asked["input_ids"].shape[1] :].tolist()
    return ByteTokenizer().decode([number for number in ids if number != tokenizer.eos_token_id])


def test_samples_are_what_transformers_says_with_the_export(job):
    samples = read_samples(job.run)
    assert [(sample["train/step"], sample["prompt"]) for sample in samples] == [(step, prompt) for step in (2, 4) for prompt in PROMPTS]
    assert [sample["text"] for sample in samples[2:]] == [said_by_transformers(job.run / "hf" / "latest", prompt, 24) for prompt in PROMPTS]
    assert [sample["text"] for sample in samples[:2]] != [sample["text"] for sample in samples[2:]]


def test_samples_are_in_the_log_the_report_and_wandb(job):
    assert job.out.count("Sample after step 2: 'What is the capital of France?' -> ") == 1
    page = (job.run / "report.html").read_text()
    assert "<h2>Samples</h2>" in page
    assert "Wie heißt du, „Hydra“?" in page
    rows = [row for row in wandb_file.read(job.run).history if "samples/path" in row]
    assert [row["train/step"] for row in rows] == [2, 4]
    assert all("eval/loss" in row and "train/loss" in row for row in rows)
    (table,) = job.run.glob(f"wandb/offline-run-*/files/{rows[1]['samples/path']}")
    content = json.loads(table.read_text())
    assert content["columns"] == ["prompt", "text"]
    assert content["data"] == [[sample["prompt"], sample["text"]] for sample in read_samples(job.run)[2:]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_change_no_bit_of_training(trained_on, ranks):
    runs = trained_on(ranks, *SAMPLED), trained_on(ranks)
    exact = ("train/step", "train/loss", "train/grad_norm", "eval/loss")
    sampled, plain = ([[row.get(name) for name in exact] for row in read_rows(run)] for run in runs)
    assert sampled == plain
    assert len(sampled) == 6
    assert len(read_samples(runs[0])) == 4
    assert not (runs[1] / "samples.jsonl").exists()
    # the seeded random generator too: it stands in the checkpoint
    states = [json.loads((run / "checkpoints" / "step-4" / "rng-0.json").read_text())["torch"] for run in runs]
    assert states[0] == states[1]


def test_a_resumed_run_gives_its_samples_again_once(job):
    done = job.cli(*JOB, *SAMPLED, "trainer.total_steps=6", "tracking.wandb.enabled=false", "hydra.run.dir=again", "checkpoint.interval=2")
    assert done.code == 0, done.text
    run = job.cli.directory / "again"
    before = read_samples(run)
    shutil.rmtree(run / "checkpoints")
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in before))
    (run / "status.json").unlink()
    done = job.cli(*JOB, *SAMPLED, "trainer.total_steps=6", "tracking.wandb.enabled=false", "hydra.run.dir=again", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert read_samples(run) == before


def test_chat_says_what_transformers_says(job):
    expected = said_by_transformers(job.run / "hf" / "latest", PROMPTS[0], 30)
    for model in ("run", "run/hf/latest"):
        done = job.cli("chat", model, "-p", PROMPTS[0], "--max-new-tokens", 30)
        assert done.code == 0, done.text
        assert done.out == expected + "\n"


def test_evaluate_gives_the_runs_own_last_loss(job):
    own = read_rows(job.run)[-1]
    for model in ("run", "run/hf/latest"):
        overrides = ["parallelism.param_dtype=float32"] if model != "run" else []
        done = job.cli("evaluate", model, "--json", *overrides)
        assert done.code == 0, done.text
        result = json.loads(done.out)
        assert {name: result[name] for name in ("eval/loss", "eval/perplexity", "eval/tokens")} == {
            name: own[name] for name in ("eval/loss", "eval/perplexity", "eval/tokens")
        }
    assert (result["truncated"], result["dropped"], result["bad_lines"]) == (0, 0, 0)
    other = job.cli("evaluate", "run", "data.eval_path=${example:openai_sft.jsonl}")
    assert other.code == 0, other.text
    assert "openai_sft.jsonl:\nloss " in other.out


def test_evaluate_says_what_it_left_out(job, tmp_path):
    """Long answers, and a line that cannot be read."""
    short, long = ({"instruction": "Say hello.", "output": "Hello." * times} for times in (1, 100))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (short, long, long)) + "{broken\n")
    held_out = ("data=alpaca", f"data.eval_path={tmp_path / 'held.jsonl'}", "data.max_length=100", "data.bad_lines=skip")
    done = job.cli("evaluate", "run", "--json", *held_out, "data.overlong=drop")
    assert done.code == 0, done.text
    result = json.loads(done.out)
    assert [result[name] for name in ("samples", "dropped", "truncated", "bad_lines")] == [1, 2, 0, 1]
    assert "held.jsonl: 3 samples; 2 dropped as too long" in done.err
    assert "1 line skipped (1 JSON)" in done.err


def test_a_file_is_evaluated_where_the_run_held_out_a_share_of_its_training_data(job):
    assert job.cli(*JOB, "trainer.total_steps=1", "data.eval_path=null", "data.eval_ratio=0.2", "hydra.run.dir=share").code == 0
    own, other = (job.cli("evaluate", "share", "--json", *more) for more in ((), ("data.eval_path=${example:openai_sft.jsonl}",)))
    assert own.code == other.code == 0, other.text
    assert json.loads(own.out)["eval/tokens"] < json.loads(other.out)["eval/tokens"]
    for change in ("data.eval_ratio=0.3", "model.chat_template=xtuner"):  # which would hold out samples that the run has trained on
        done = job.cli("evaluate", "share", change)
        assert done.code == 2, done.text
        assert "not the samples that the run held out" in done.err
    assert job.cli("evaluate", "share", "data.eval_ratio=0.1").code == 0


def test_evaluate_of_a_directory_needs_no_training_data(job, tmp_path, monkeypatch, capsys):
    (tmp_path / "held.jsonl").write_text('{"instruction": "Say hello.", "output": "Hello."}\n')
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(job.run / "hf" / "latest"), "data=alpaca", "data.eval_path=held.jsonl"]) == 0
    assert "held.jsonl:\nloss " in capsys.readouterr().out


def test_evaluate_of_a_run_on_two_ranks_is_near_its_own(job, trained_on):
    run = trained_on(2, *SAMPLED)
    done = job.cli("evaluate", run, "--json")
    assert done.code == 0, done.text
    assert json.loads(done.out)["eval/loss"] == pytest.approx(read_rows(run)[-1]["eval/loss"], rel=1e-5)


def test_export_writes_any_step_in_any_dtype(job):
    directory = job.cli.directory
    done = job.cli("export", "run", "--to", "newest")
    assert done.code == 0, done.text
    same, kept = tensors(directory / "newest"), tensors(job.run / "hf" / "step-4")
    assert same.keys() == kept.keys()
    assert all(torch.equal(same[name], kept[name]) for name in kept)
    (directory / "older").mkdir()
    done = job.cli("export", "run", "--step", 2, "--dtype", "bfloat16", "--to", "older")
    assert done.code == 0, done.text
    assert "exported step 2" in done.out
    assert {tensor.dtype for tensor in tensors(directory / "older").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(directory / "older")
    assert model.dtype == torch.bfloat16
    assert not torch.equal(model.lm_head.weight.float(), kept["lm_head.weight"].bfloat16().float())
    assert not list(directory.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "run", "--step", "3", "--to", "new"], "has no checkpoint of step 3; there are checkpoints of step 2, 4"),
        (["export", "run", "--to", "run"], "--to .*run: holds something already"),
        (["export", "run", "--to", "new", "--merge"], "has no adapter to merge; leave --merge out"),
        (["export", "run", "--to", "no/where"], "no is not a directory; make it first"),
        (["export", "nowhere", "--to", "new"], "nowhere: not a run directory"),
        (["evaluate", "run", "model.hidden_size=8"], "model.hidden_size: the weights belong to the model as it is"),
        (["evaluate", "run", "optimizer.lrr=1"], "optimizer.lrr: there is no such key"),
        (["evaluate", "run", "optimizer.lr=1"], "optimizer.lr: plays no part where nothing is trained"),
        (["evaluate", "run", "trainer.epochs=2"], "trainer.epochs: plays no part where nothing is trained"),
        (["evaluate", "run", "data.path=other.jsonl"], "data.path: is training data; name held-out data with data.eval_path=FILE"),
        (["evaluate", "run", "scheduler=wsd"], "scheduler: plays no part where nothing is trained"),
        (["evaluate", "run", "data.eval_path=null"], "there is no held-out data"),
        (["evaluate"], "name one run or Hugging Face directory"),
        (["evaluate", "run", "run"], "name one run or Hugging Face directory"),
        (["chat", "nowhere", "-p", "x"], "nowhere: there is no such directory"),
        (["chat", ".", "-p", "x"], r"neither a run \(config.yaml\) nor a Hugging Face model"),
        (["chat", "run", "-p", "x" * 50000], "are more than the 40960 that the model reads at most"),
        (["debug=fast", "trainer.sample_prompts=[x]", "trainer.sample_tokens=50000"], "trainer.sample_prompts=.*40960"),
        (["debug=fast", "trainer.sample_prompts=[x]", "trainer.eval_interval=null"], "set trainer.eval_interval too"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(job, words, message, monkeypatch, capsys):
    monkeypatch.chdir(job.cli.directory)
    assert main(words) == 2
    err = capsys.readouterr().err
    (line,) = err.strip().splitlines()
    assert re.search(message, line), line
    assert not (job.cli.directory / "new").exists()


def test_a_checkpoint_that_is_not_whole_is_passed_over_and_refused_by_its_step(job, tmp_path, monkeypatch, capsys, caplog):
    shutil.copytree(job.run / "checkpoints", tmp_path / "run" / "checkpoints")
    shutil.copy(job.run / "config.yaml", tmp_path / "run")
    shutil.copy(job.run / "overrides.yaml", tmp_path / "run")
    shard = next((tmp_path / "run" / "checkpoints" / "step-4").glob("rank-*.safetensors"))
    flip_bit(shard, at=-1)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--step", "4", "--to", "new"]) == 2
    assert "step-4 is not a whole checkpoint" in capsys.readouterr().err
    assert main(["export", "run", "--to", "new"]) == 0
    assert "exported step 2" in capsys.readouterr().out
    assert "step-4 is skipped: " in caplog.text


def test_an_export_follows_an_evaluation_also_where_no_checkpoint_is_saved_between(job):
    done = job.cli(*JOB, "checkpoint.interval=null", "tracking.wandb.enabled=false", "hydra.run.dir=exported")
    assert done.code == 0, done.text
    assert torch.equal(
        tensors(job.cli.directory / "exported" / "hf" / "step-4")["lm_head.weight"], tensors(job.run / "hf" / "step-4")["lm_head.weight"]
    )
