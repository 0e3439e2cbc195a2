"""A run that is stopped and continued repeats the uninterrupted one, bit for bit."""

import json
import shutil

import pytest
from conftest import CommandLine, read_rows, read_status
from exactness import assert_same, trajectory

from xtuner_hydra.files import checksum

JOB = (
    "debug=fast",
    "trainer.total_steps=6",
    "checkpoint.interval=2",
    "checkpoint.hf_interval=null",
    "checkpoint.keep=9",
    "tracking=none",
    "data.eval_path=null",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps in one go, with checkpoints after 2, 4 and 6."""
    cli = CommandLine(tmp_path_factory.mktemp("whole"))
    done = cli(*JOB, "hydra.run.dir=whole")
    assert done.code == 0, done.text
    return cli


def test_auto_resume_drops_later_rows_and_repeats_them_exactly(whole):
    run = whole.directory / "cut"
    shutil.copytree(whole.directory / "whole", run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    (run / "status.json").unlink()
    done = whole(*JOB, "hydra.run.dir=cut", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert "step 2/6" in done.out
    assert_same(run, whole.directory / "whole", 6)


def test_a_half_written_checkpoint_is_passed_over(whole):
    run = whole.directory / "damaged"
    shutil.copytree(whole.directory / "whole", run)
    shutil.rmtree(run / "checkpoints" / "step-6")
    (run / "status.json").unlink()
    shard = run / "checkpoints" / "step-4" / "rank-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = whole(*JOB, "hydra.run.dir=damaged", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert "step-4 is skipped: rank-0.safetensors has " in done.text
    assert "step 2/6" in done.out
    assert_same(run, whole.directory / "whole", 6)


def test_a_path_continues_in_a_new_directory(whole):
    done = whole(*JOB, "hydra.run.dir=onwards", "checkpoint.resume=whole/checkpoints/step-4")
    assert done.code == 0, done.text
    assert trajectory(whole.directory / "onwards") == trajectory(whole.directory / "whole")[4:]
    assert f"  resume: {whole.directory}/whole/checkpoints/step-4\n" in (whole.directory / "onwards" / "config.yaml").read_text()


def test_a_new_directory_has_a_checkpoint_of_its_own_from_the_start(whole):
    """A crash, or a signal, before the first save that is due must not let resume=auto begin at step 0."""
    one = ("hydra.run.dir=apart", "checkpoint.interval=-1", "trainer.max_seconds=0.1")
    done = whole(*JOB, "checkpoint.resume=whole/checkpoints/step-4", *one)
    assert done.code == 75, done.text
    assert "continue with checkpoint.resume=auto" in done.text
    assert [path.name for path in (whole.directory / "apart" / "checkpoints").iterdir()] == ["step-4"]
    done = whole(*JOB, "hydra.run.dir=apart", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert trajectory(whole.directory / "apart") == trajectory(whole.directory / "whole")[4:]


def test_a_run_that_is_stopped_before_its_first_step_does_not_promise_a_checkpoint(whole):
    done = whole(*JOB, "hydra.run.dir=stillborn", "trainer.max_seconds=0.1")
    assert done.code == 75, done.text
    assert "no checkpoint was saved: checkpoint.resume=auto would start at step 0" in done.text


def test_a_run_that_has_gone_further_is_not_ended_sooner(whole):
    run = whole.directory / "further"
    shutil.copytree(whole.directory / "whole", run)
    (run / "status.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    done = whole(*JOB, "hydra.run.dir=further", "checkpoint.resume=auto", "trainer.total_steps=5")
    assert done.code == 2, done.text
    assert "step-6 is beyond the end, step 5" in done.text
    assert (run / "metrics.jsonl").read_bytes() == before


def test_auto_on_a_completed_run_says_so_and_changes_nothing(whole):
    before = (whole.directory / "whole" / "metrics.jsonl").read_bytes()
    done = whole(*JOB, "hydra.run.dir=whole", "checkpoint.resume=auto")
    assert done.code == 0
    assert "complete" in done.out
    assert (whole.directory / "whole" / "metrics.jsonl").read_bytes() == before


def test_a_completed_run_without_a_checkpoint_is_not_started_over(whole):
    directory = whole.directory / "kept_none"
    command = (*JOB, "checkpoint=none", "checkpoint.interval=null", "checkpoint.resume=auto", f"hydra.run.dir={directory}")
    assert whole(*command).code == 0
    before = (directory / "metrics.jsonl").read_bytes()
    refused = whole(*command, "trainer.total_steps=9")
    assert (refused.code, "kept no checkpoint to continue from" in refused.err) == (2, True), refused.text
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert whole(*command).code == 0  # there is nothing to do


def test_auto_without_a_checkpoint_starts_at_the_beginning(whole):
    done = whole("debug=fast", "tracking=none", "checkpoint=none", "checkpoint.resume=auto", "data.eval_path=null", "hydra.run.dir=fresh")
    assert done.code == 0, done.text
    assert len(trajectory(whole.directory / "fresh")) == 2


def test_a_longer_run_goes_on_at_the_last_learning_rate_and_says_so(whole):
    run = whole.directory / "longer"
    shutil.copytree(whole.directory / "whole", run)
    done = whole(*JOB, "trainer.total_steps=8", "hydra.run.dir=longer", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert "the run continues to step 8, its schedule was made for 6: the learning rate stays at its final value, 1e-06" in done.text
    assert trajectory(run)[:6] == trajectory(whole.directory / "whole")
    assert [row["train/lr"] for row in read_rows(run)][6:] == [1e-6, 1e-6]


def test_a_run_that_had_not_begun_to_decay_is_made_longer_as_if_it_had_been_so_long(whole):
    """With wsd, from before the decay of 6 steps: rates and losses are those of 12 in one go."""
    wsd = ("scheduler=wsd", "scheduler.decay_ratio=0.5", "scheduler.warmup_ratio=0", "optimizer.lr=1e-2")
    for name, more in (
        ("short", ()),
        ("made-longer", ("trainer.total_steps=12", "checkpoint.resume=short/checkpoints/step-2")),
        ("long", ("trainer.total_steps=12",)),
    ):
        done = whole(*JOB, *wsd, *more, f"hydra.run.dir={name}")
        assert done.code == 0, done.text
    rates = [row["train/lr"] for row in read_rows(whole.directory / "long")]
    assert rates[:7] == [rates[0]] * 7 > rates[7:]
    same = trajectory(whole.directory / "long")[2:]
    assert trajectory(whole.directory / "made-longer") == same


def test_prompts_are_answered_once_a_step(whole):
    asks = ("debug=fast", "tracking=none", "data.eval_path=null", "checkpoint.hf_interval=null", "hydra.run.dir=asks")
    for steps in (1, 2):
        done = whole(
            *asks, "trainer.sample_prompts=[hello]", "trainer.sample_tokens=2", f"trainer.total_steps={steps}", "checkpoint.resume=auto"
        )
        assert done.code == 0, done.text
    lines = (whole.directory / "asks" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/step"] for line in lines] == [1, 2]


def test_what_a_step_was_saved_without_is_done_once_and_saved_too(whole):
    """A signal during an evaluation saves the step without it; a crash after the next evaluation leaves a row that no checkpoint knows."""
    job = (
        "debug=fast",
        "trainer.total_steps=2",
        "checkpoint.hf_interval=null",
        "tracking=none",
        "trainer.sample_prompts=[a]",
        "hydra.run.dir=late",
    )
    assert whole(*job, "trainer.sample_tokens=2").code == 0
    run = whole.directory / "late"
    evaluation, rows, samples = change_state(run, 2, evaluation={}, sampled=False)["evaluation"], read_rows(run), samples_of(run)
    (run / "status.json").unlink()
    done = whole(*job, "trainer.sample_tokens=2", "checkpoint.resume=auto")
    assert done.code == 0, done.text
    assert read_rows(run) == rows
    assert samples_of(run) == samples
    assert change_state(run, 2)["evaluation"] == evaluation


def samples_of(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def change_state(run, step, **values):
    """Make a checkpoint one that was taken in another state; returns the state it had."""
    checkpoint = run / "checkpoints" / f"step-{step}"
    file, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"state": before["state"] | values}))
    listed = json.loads(manifest.read_text())
    listed["files"]["state.json"] = {"size": file.stat().st_size, "crc32": checksum(file)}
    manifest.write_text(json.dumps(listed))
    return before["state"]


def test_another_trajectory_is_accepted_where_it_is_named(whole):
    change = ("data.shuffle=false", "checkpoint.resume=whole/checkpoints/step-4", "hydra.run.dir=changed")
    refused = whole(*JOB, *change)
    assert refused.code == 2, refused.text
    assert "data.shuffle: True -> False" in refused.err
    done = whole(*JOB, *change, "checkpoint.allow_change=[data]")
    assert done.code == 0, done.text
    assert "checkpoint.resume: data.shuffle was True until step-4, and is False from there" in done.text
    assert [row["train/step"] for row in read_rows(whole.directory / "changed")] == [5, 6]


def test_changes_that_leave_the_trajectory_alone_pass(whole):
    harmless = (
        "checkpoint.keep=2",
        "checkpoint.asynchronous=true",
        "trainer.log_interval=1",
        "data.num_workers=0",
        "tracking.tensorboard=true",
    )
    done = whole(*JOB, *harmless, "checkpoint.resume=whole/checkpoints/step-4", "hydra.run.dir=harmless")
    assert done.code == 0, done.text
    assert trajectory(whole.directory / "harmless") == trajectory(whole.directory / "whole")[4:]


@pytest.mark.parametrize("change", ["trainer.seed=7", "data.pack_max_length=128", "model.hidden_size=32", "trainer.global_batch_size=2"])
def test_another_trajectory_is_refused(whole, change):
    done = whole(*JOB, change, "hydra.run.dir=other", "checkpoint.resume=whole")
    assert done.code == 2, done.text
    assert "belongs to a run with different settings" in done.err
    assert not (whole.directory / "other").exists()


def test_what_changed_on_the_way_is_told_and_a_rerun_says_that_it_is_not_repeated(whole):
    run = whole.directory / "warmer"
    shutil.copytree(whole.directory / "whole", run)
    (run / "status.json").unlink()
    longer = ("hydra.run.dir=warmer", "checkpoint.resume=auto", "trainer.total_steps=7", "optimizer.lr=2e-3")
    done = whole(*JOB, *longer)
    assert done.code == 0, done.text
    changes = [
        "optimizer.lr was 6e-05 until step-6, and is 0.002 from there on",
        "the end was step 6 until step-6, and is step 7 from there on",
    ]
    assert f"checkpoint.resume: {changes[0]}" in done.text
    assert json.loads((run / "environment.json").read_text())["changes"] == changes
    again = whole("rerun", "warmer", "hydra.run.dir=warmer-again")
    assert again.code == 0, again.text
    assert all(f"not exactly the same: {change}; now throughout" in again.err for change in changes)


def test_of_two_commands_in_one_directory_one_is_refused_and_the_other_loses_nothing(whole, tmp_path):
    job = [*JOB, f"hydra.run.dir={tmp_path / 'run'}", "checkpoint.resume=auto", "trainer.total_steps=20"]
    processes = [whole.start(*job) for _ in range(2)]
    assert sorted(process.wait(120) for process in processes) in ([0, 2], [0, 0])  # the second may come when all is done
    assert [row["train/step"] for row in read_rows(tmp_path / "run")] == list(range(1, 21))
    assert read_status(tmp_path / "run")["state"] == "completed"


def test_a_path_without_a_checkpoint_is_refused(whole):
    done = whole(*JOB, "hydra.run.dir=other", "checkpoint.resume=nowhere")
    assert (done.code, "no such file or directory" in done.err) == (2, True)


def test_a_checkpoint_of_one_rank_continues_on_two(whole):
    job = [*JOB, "trainer.global_batch_size=2"]
    assert whole(*job, "hydra.run.dir=batch2").code == 0
    done = whole(*job, "parallelism.nproc_per_node=2", "hydra.run.dir=two", "checkpoint.resume=batch2/checkpoints/step-4")
    assert done.code == 0, done.text
    one, two = (read_rows(whole.directory / name) for name in ("batch2", "two"))
    assert [row["train/loss"] for row in two] == pytest.approx([row["train/loss"] for row in one[4:]], rel=1e-3)
    assert [row["train/tokens"] for row in two] == [row["train/tokens"] for row in one[4:]]
    assert read_status(whole.directory / "two")["state"] == "completed"
