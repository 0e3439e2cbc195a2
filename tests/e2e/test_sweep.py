"""A sweep with real jobs: in processes of their own, side by side, killed and resumed, and a table that tells the truth."""

import csv
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY, CommandLine, read_rows, read_status, stop, wait_for


def sweep_file(directory):
    return json.loads((directory / "sweep.json").read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three jobs, of which the one with an absurd learning rate fails in training."""
    cli = CommandLine(tmp_path_factory.mktemp("sweep"))
    done = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e30,1e-4", "tracking=none", "hydra.sweep.dir=sweep")
    return done, cli.directory / "sweep", cli


def test_a_failed_job_fails_the_sweep_after_the_others(swept):
    done, directory, _ = swept
    assert done.code == 1, done.text
    jobs = sorted(path.parent for path in directory.glob("*/status.json"))
    assert [read_status(job)["state"] for job in jobs] == ["completed", "failed", "completed"]
    assert [job.name for job in jobs] == ["0_lr0.001", "1_lr1e_30", "2_lr0.0001"]


def test_the_table_is_on_screen_and_in_files_with_the_jobs_own_numbers(swept):
    done, directory, _ = swept
    rows = list(csv.DictReader((directory / "sweep.csv").open()))
    assert [row["state"] for row in rows] == ["completed", "failed", "completed"]
    assert "optimizer.lr=0.001" in rows[0]["overrides"]
    for row in rows[::2]:
        metrics = read_rows(directory / row["job"])
        assert float(row["eval/loss"]) == metrics[-1]["eval/loss"]
        assert float(row["train/loss"]) == metrics[-2]["train/loss"]
    assert "optimizer.nonfinite" in rows[1]["error"]
    assert "optimizer.nonfinite" in done.out


def test_piped_output_has_a_line_a_change(swept):
    done, _, _ = swept
    lines = [line for line in done.out.splitlines() if "job 1 (optimizer.lr=1e+30)" in line]
    assert ["started" in line or "failed" in line for line in lines] == [True, True]
    assert "Traceback" not in done.text
    assert "\x1b" not in done.out


def test_the_best_jobs_checkpoint_and_export_stay_alone(swept):
    _, directory, _ = swept
    losses = {job.name: read_rows(job)[-1]["eval/loss"] for job in directory.glob("[02]_*")}
    best = min(losses, key=losses.get)
    failed = "1_lr1e_30"  # keeps what it saved before the step that failed
    assert {path.parent.name for path in directory.glob("*/checkpoints")} == {best, failed}
    assert [path.parent.parent.name for path in directory.glob("*/hf/latest")] == [best]


def test_a_taken_sweep_directory_is_refused(swept):
    _, _, cli = swept
    done = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e-4", "hydra.sweep.dir=sweep")
    assert (done.code, "holds a sweep already" in done.err, "sweep.resume=" in done.err) == (2, True, True)


def test_other_overrides_are_refused_when_resuming(swept):
    _, _, cli = swept
    done = cli("-m", "sweep.resume=sweep", "debug=fast", "optimizer.lr=1e-3,1e-5")
    assert (done.code, "was started with" in done.err) == (2, True)


def test_what_is_no_sweep_cannot_be_resumed(swept):
    _, _, cli = swept
    done = cli("-m", "sweep.resume=sweep/0_lr0.001")
    assert (done.code, "not a sweep's directory" in done.err) == (2, True)


def test_resuming_runs_the_failed_job_and_leaves_the_others(swept):
    _, directory, cli = swept
    before = {job.name: (job / "metrics.jsonl").read_bytes() for job in directory.glob("[02]_*")}
    done = cli("++sweep.resume=sweep", "++sweep.retries=1")
    assert (done.code, done.out.count("job 1 (optimizer.lr=1e+30): started")) == (1, 2), done.text
    assert {job.name: (job / "metrics.jsonl").read_bytes() for job in directory.glob("[02]_*")} == before
    assert [job["attempts"] for job in sweep_file(directory)["jobs"]] == [1, 3, 1]


def test_a_killed_sweep_goes_on_from_its_jobs_checkpoints(tmp_path):
    cli = CommandLine(tmp_path)
    process = cli.start_fresh(
        *("-m", "debug=fast", "optimizer.lr=1e-3,1e-4", "trainer.total_steps=100", "checkpoint.interval=10", "data.eval_path=null"),
        *("tracking=none", "hydra.sweep.dir=sweep"),
    )
    job = tmp_path / "sweep" / "0_lr0.001"
    wait_for(lambda: (job / "checkpoints" / "step-10").exists(), process)
    pids = [read_status(path.parent)["process"]["pid"] for path in (tmp_path / "sweep").glob("*/status.json")]
    for pid in (process.pid, *pids):  # all at once: none can write how it ended
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert read_status(job)["state"] == "running"
    wait_for(lambda: not any(_runs(pid) for pid in pids))
    config = (job / "config.yaml").read_text()
    done = cli("-m", "sweep.resume=sweep", timeout=280)
    assert done.code == 0, done.text
    assert "killed" in done.out.splitlines()[2]
    assert "job 0 (optimizer.lr=0.001): started, continues from step-" in done.out
    assert [row["train/step"] for row in read_rows(job)] == list(range(1, 101))
    assert (job / "config.yaml").read_text() == config
    assert sweep_file(tmp_path / "sweep")["state"] == "completed"


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_the_group_stops_all_jobs_marks_them_and_writes_the_report(tmp_path, number, code):
    """As a terminal, `timeout` and schedulers send it: to the server from which jobs are forked too."""
    cli = CommandLine(tmp_path)
    process = cli.start_fresh(
        *("-m", "debug=fast", "optimizer.lr=1e-3,1e-4,1e-5", "trainer.total_steps=5000", "hydra.launcher.slots=2", "tracking=none"),
        *("checkpoint=none", "hydra.sweep.dir=sweep"),
    )
    jobs = [tmp_path / "sweep" / name for name in ("0_lr0.001", "1_lr0.0001")]
    wait_for(lambda: all((job / "metrics.jsonl").exists() and len(read_rows(job)) > 2 for job in jobs), process)
    os.killpg(process.pid, number)
    assert process.wait(90) == code
    assert [read_status(job)["state"] for job in jobs] == ["interrupted", "interrupted"]
    assert not any(_runs(read_status(job)["process"]["pid"]) for job in jobs)
    assert not (tmp_path / "sweep" / "2_lr1e-05").exists()
    states = [row["state"] for row in csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())]
    assert states[:2] == ["interrupted", "interrupted"]
    assert sweep_file(tmp_path / "sweep")["state"] == "interrupted"
    assert "Traceback" not in (tmp_path / "output").read_text()


def test_ctrl_c_while_the_first_job_is_started_marks_it_too(tmp_path):
    """In a terminal it reaches the whole group, and so the server from which jobs are forked, which still imports."""
    cli, job = CommandLine(tmp_path), tmp_path / "sweep" / "0_lr0.001"
    process = cli.start_fresh(*("-m", "debug=fast", "tracking=none", "optimizer.lr=1e-3,1e-4", "hydra.sweep.dir=sweep"))
    wait_for(lambda: (job / "status.json").exists(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in (tmp_path / "output").read_text()
    assert read_status(job)["state"] == sweep_file(tmp_path / "sweep")["state"] == "interrupted"


def test_packing_lengths_share_one_token_cache_and_one_set_of_held_out_tokens(tmp_path):
    cli = CommandLine(tmp_path)
    done = cli(
        *("-m", "debug=fast", "data.pack_max_length=128,256", "trainer.seed=0,1", "trainer.total_tokens=600", "trainer.total_steps=null"),
        *("tracking=none", "sweep.keep=all", "checkpoint.hf_interval=null", "hydra.sweep.dir=sweep"),
    )
    assert done.code == 0, done.text
    assert len(list((tmp_path / ".cache").rglob("meta.json"))) == 2  # training data and held-out data
    jobs = sorted((tmp_path / "sweep").glob("[0-3]_*"))
    assert len({read_rows(job)[-1]["eval/tokens"] for job in jobs}) == 1
    assert all(600 <= read_rows(job)[-1]["train/total_tokens"] < 600 + 256 for job in jobs)
    assert all(list(job.glob("checkpoints/step-*")) for job in jobs)


def test_a_bayesian_search_stops_hopeless_jobs_and_can_be_resumed(tmp_path):
    pytest.importorskip("optuna")
    cli = CommandLine(tmp_path)
    arguments = ("sweep=lr_search", "debug=fast", "trainer.total_steps=9", "trainer.eval_interval=1", "sweep.trials=4", "tracking=none")
    process = cli.start(*arguments, "hydra.sweep.dir=sweep", "hydra.launcher.slots=1")
    wait_for(lambda: (tmp_path / "sweep" / "sweep.csv").exists(), process)  # the first job has ended
    assert stop(process, signal.SIGINT) == 130
    first = sweep_file(tmp_path / "sweep")["jobs"]
    done = cli("sweep.resume=sweep")
    assert done.code == 0, done.text
    after = sweep_file(tmp_path / "sweep")
    assert after["jobs"][: len(first) - 1] == first[:-1]
    assert len({tuple(job["overrides"]) for job in after["jobs"]}) == 4
    states = [row["state"] for row in csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())]
    assert states[0] == "completed"
    assert set(states) <= {"completed", "pruned"}


def test_a_sweep_is_resumed_from_anywhere_but_not_on_other_data(tmp_path):
    cli = CommandLine(tmp_path)
    chats = (REPOSITORY / "xtuner_hydra" / "examples" / "openai_sft.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_text("".join(chats[:20]))
    arguments = ("debug=fast", "data=openai", "data.path=chats.jsonl", "tracking=none", "checkpoint=none", "hydra.sweep.dir=sweep")
    assert cli("-m", "optimizer.lr=1e-3,1e30", *arguments).code == 1
    (tmp_path / "elsewhere").mkdir()
    cli.directory = tmp_path / "elsewhere"
    planned = cli("plan", "sweep.resume=../sweep")
    assert (planned.code, planned.out.count("done")) == (0, 1), planned.text
    done = cli("sweep.resume=../sweep")
    assert (done.code, "job 1 (optimizer.lr=1e+30): started" in done.out, "continue with: " in done.out) == (1, True, True), done.text
    (tmp_path / "chats.jsonl").write_text("".join(chats[20:40]))
    refused = cli("sweep.resume=../sweep")
    assert (refused.code, "have changed since the sweep was started" in refused.err) == (2, True), refused.text


def test_submitit_runs_the_jobs_on_this_machine(tmp_path):
    pytest.importorskip("submitit")
    cli = CommandLine(tmp_path)
    done = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e30", "tracking=none", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep")
    assert done.code == 1, done.text
    assert [row["state"] for row in csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())] == ["completed", "failed"]
    refused = cli("-m", "debug=fast", "optimizer.lr=1e-3,1e-4", "hydra/launcher=submitit_slurm", "hydra.sweep.dir=slurm")
    assert (refused.code, "slurm" in refused.err) == (2, True)


SWEEPER = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Twice(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments):
        (first,) = self.launcher.launch([[*arguments, "optimizer.lr=1e-3"]], 0)
        (second,) = self.launcher.launch([[*arguments, "optimizer.lr=2e-3"]], 1)
        print("RETURNED", first.return_value, second.return_value)

ConfigStore.instance().store(group="hydra/sweeper", name="twice", node={"_target_": "hydra_plugins.twice.Twice"})
"""


def test_a_sweeper_plugin_of_hydra_gets_each_jobs_metric(tmp_path):
    (tmp_path / "hydra_plugins" / "twice").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "twice" / "__init__.py").write_text(SWEEPER)
    cli = CommandLine(tmp_path)
    cli.environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = cli.fresh("-m", "hydra/sweeper=twice", "debug=fast", "tracking=none", "checkpoint=none", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.text
    returned = next(line for line in done.out.splitlines() if line.startswith("RETURNED")).split()[1:]
    jobs = sorted((tmp_path / "sweep").glob("[01]_*"))
    assert list(map(float, returned)) == [read_rows(job)[-1]["eval/loss"] for job in jobs]


def test_plan_lists_jobs_and_their_cost_and_creates_nothing(tmp_path):
    cli = CommandLine(tmp_path)
    done = cli("plan", "-m", "debug=fast", "optimizer.lr=1e-3,0.001,1e-4", "data.pack_max_length=128,256")
    assert done.code == 0, done.text
    assert done.out.count("the same as job") == 2
    assert "4, varying optimizer.lr, data.pack_max_length" in done.out
    assert re.search(r"^run in +\d slots? of \d thread", done.out, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == [".cache"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "optimizer.lr=1e-3,-1"], "optimizer.lr=-1"),
        (["-m", "sweep.metric=eval/los", "optimizer.lr=1,2"], "Did you mean eval/loss"),
        (["-m", "sweep.metric=eval/loss", "data.eval_path=null", "optimizer.lr=1,2"], "data.eval_path"),
        (["-m", "sweep.early_stop=true", "sweep.search=bayes", "optimizer.lr=1,2"], "trainer.eval_interval=N"),
        (["-m", "sweep.metric=throughput/tgs", "optimizer.lr=1,2"], "more of it is better; add sweep.direction=maximize"),
        (
            ["-m", "tracking.jsonl=false", "optimizer.lr=1,2"],
            "tracking.jsonl=false: a sweep follows and compares its jobs by metrics.jsonl",
        ),
        (["-m", "sweep.early_stop=true", "optimizer.lr=1,2"], "sweep.search=random or bayes"),
        (["-m", "sweep=lr_search", "sweep.metric=train/loss"], "sweep.early_stop=True: jobs are judged by their evaluations"),
        (["-m"], "nothing to sweep"),
        (["sweep.retries=2"], "add -m"),
        (["++sweep.retries=2"], "add -m"),
        (["-m", "hydra/launcher=basic", "optimizer.lr=1,2"], "submitit_local"),
        (["-m", "hydra.launcher.slot=1", "optimizer.lr=1,2"], "hydra.launcher.slot"),
        (["-m", "+hydra.launcher.slot=1", "optimizer.lr=1,2"], "no such option"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_starts(tmp_path, arguments, words):
    cli = CommandLine(tmp_path)
    done = cli("debug=fast", *arguments, "hydra.sweep.dir=sweep")
    assert (done.code, words in done.err) == (2, True), done.text
    assert "Traceback" not in done.text
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("closed", [pytest.param("<&-", marks=pytest.mark.faults), "<&- >&- 2>&-"])
def test_a_sweep_needs_no_standard_streams(cli, closed):
    command = f"{sys.executable} -m xtuner_hydra -m debug=fast tracking=none optimizer.lr=1e-3,2e-3 hydra.sweep.dir=sweep {closed}"
    assert subprocess.run(["bash", "-c", command], cwd=cli.directory, env=cli.environment, timeout=120).returncode == 0
    assert "completed at step 2" in (cli.directory / "sweep" / "0_lr0.001" / "logs" / "console.log").read_text()


def test_jobs_end_with_a_sweep_that_is_killed(cli):
    process = cli.start_fresh(
        *("-m", "debug=fast", "tracking=none", "optimizer.lr=1e-3,2e-3", "trainer.total_steps=5000", "hydra.sweep.dir=sweep"),
        "hydra.launcher.slots=1",
    )
    job = cli.directory / "sweep" / "0_lr0.001"
    wait_for(lambda: (job / "metrics.jsonl").exists() and read_rows(job), process)
    process.kill()
    process.wait()
    wait_for(lambda: read_status(job)["state"] == "interrupted", seconds=60)
    assert read_status(job)["exit_code"] == 75
