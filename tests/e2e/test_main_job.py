"""One run from the command line to everything that it leaves: read as a user, and other programs, would."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import CommandLine, read_rows, read_status

STEP_LINE = re.compile(
    r"^\[xtuner_hydra\]\[RANK 0\]\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]\[INFO\] Step (\d+)/4 data_time: \d+\.\d{4} lr: \S+ time: \d+\.\d{4} "
    r"text_tokens: \d+\.\d total_loss: \d+\.\d{3} reduced_llm_loss: \d+\.\d{3} max_memory: \d+\.\d\d GB reserved_memory: \d+\.\d\d GB "
    r"grad_norm: \d+\.\d{3} tgs: \d+\.\d e2e_tgs: \d+\.\d$",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """`debug=fast` with evaluations, checkpoints and exports at an interval."""
    cli = CommandLine(tmp_path_factory.mktemp("job"))
    done = cli.fresh(
        "debug=fast", "trainer.total_steps=4", "trainer.eval_interval=2", "checkpoint.interval=1", "checkpoint.keep=2", "hydra.run.dir=run"
    )
    assert done.code == 0, done.text
    return SimpleNamespace(done=done, run=cli.directory / "run", cli=cli)


def test_the_screen_tells_the_story_in_xtuners_lines(job):
    assert [int(step) for step in STEP_LINE.findall(job.done.out)] == [1, 2, 3, 4]
    assert "Traceback" not in job.done.text
    for words in ("byte", "openai_sft.jsonl", "gradient accumulation steps: 1", "model.layers.[0-1].mlp.up_proj.weight"):
        assert words in job.done.out


def test_metrics_have_the_fixed_names_and_add_up(job):
    rows = [row for row in read_rows(job.run) if "train/loss" in row]
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) >= {
        *(
            "train/step",
            "train/epoch",
            "train/loss",
            "train/lr",
            "train/grad_norm",
            "train/tokens",
            "train/supervised_tokens",
            "train/total_tokens",
        ),
        *(
            "throughput/tgs",
            "throughput/e2e_tgs",
            "throughput/step_time",
            "throughput/data_time",
            "throughput/mfu",
            "throughput/pack_utilization",
        ),
        *("memory/max_gb", "memory/reserved_gb"),
    }
    assert [row["train/total_tokens"] for row in rows] == [sum(row["train/tokens"] for row in rows[: n + 1]) for n in range(4)]
    assert all(0 < row["train/supervised_tokens"] <= row["train/tokens"] < 256 for row in rows)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] + 0.5


def test_evaluations_come_at_the_interval_and_perplexity_is_their_exponential(job):
    rows = [row for row in read_rows(job.run) if "eval/loss" in row]
    assert [row["train/step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["eval/perplexity"] == pytest.approx(torch.tensor(row["eval/loss"], dtype=torch.float64).exp().item())


def test_run_directory_is_complete_and_says_completed(job):
    status = read_status(job.run)
    assert (status["state"], status["exit_code"], status["step"], status["error"]) == ("completed", 0, 4, None)
    assert status["metrics"]["train/step"] == 4
    assert (job.run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((job.run / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    assert '- "debug=fast"' in (job.run / "overrides.yaml").read_text()
    assert "Step 4/4" in (job.run / "logs" / "rank0.log").read_text()


def test_only_the_newest_checkpoints_stay(job):
    assert sorted(path.name for path in (job.run / "checkpoints").iterdir()) == ["step-3", "step-4"]


def test_config_yaml_repeats_the_run(job):
    """Its values, given as an experiment of the user's own, make a run with the same numbers."""
    own = job.cli.directory / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "again.yaml").write_text("# @package _global_\n" + (job.run / "config.yaml").read_text())
    done = job.cli.fresh("--config-dir", "own", "experiment=again", "checkpoint=none", "tracking=none", "hydra.run.dir=repeated")
    assert done.code == 0, done.text
    again = [row for row in read_rows(job.cli.directory / "repeated") if "train/loss" in row]
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in read_rows(job.run) if "train/loss" in row]


def test_tensorboard_reads_the_same_numbers(job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job.run / "tensorboard"))
    events.Reload()
    seen = {event.step: event.value for event in events.Scalars("train/loss")}
    assert seen == pytest.approx({row["train/step"]: row["train/loss"] for row in read_rows(job.run) if "train/loss" in row}, rel=1e-6)


def test_transformers_loads_the_export_with_equal_logits(job):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xtuner_hydra.model.pretrained import load_pretrained
    from xtuner_hydra.model.transformer import CausalLM
    from xtuner_hydra.run_dir import read_config

    latest = job.run / "hf" / "latest"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(latest), AutoTokenizer.from_pretrained(latest)
    assert theirs.dtype == torch.float32
    ours = CausalLM(read_config(job.run).model)
    load_pretrained(ours, latest)
    ids = torch.tensor(tokenizer("What is 2 + 2?")["input_ids"])
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        logits = ours(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_export_is_the_trained_model(job):
    """Continuing from the export with lr=0 starts at the loss at which the run ended (the same packs, the weights of its last step)."""
    done = job.cli.fresh(
        *(
            "debug=fast",
            f"model.pretrained={job.run}/hf/latest",
            "optimizer.lr=0",
            "scheduler.lr_min=0",
            "tracking=none",
            "checkpoint=none",
        ),
        "hydra.run.dir=again",
    )
    assert done.code == 0, done.text
    (evaluated,) = [row for row in read_rows(job.cli.directory / "again") if "eval/loss" in row]
    assert evaluated["eval/loss"] == pytest.approx(read_status(job.run)["metrics"]["eval/loss"], rel=1e-6)


def test_the_directory_of_a_run_is_refused_to_another(job):
    before = (job.run / "metrics.jsonl").read_bytes()
    done = job.cli.fresh("debug=fast", "hydra.run.dir=run")
    assert done.code == 2
    assert "holds a run already" in done.err
    assert (job.run / "metrics.jsonl").read_bytes() == before
