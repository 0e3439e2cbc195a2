"""How a sweep treats its jobs, with jobs that only write what real ones would."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from xtuner_hydra import run_dir
from xtuner_hydra.app import App
from xtuner_hydra.errors import RefusedError, TrainingError
from xtuner_hydra.results.glance import glance
from xtuner_hydra.results.sweep import SweepPlan, read_sweep
from xtuner_hydra.sweeps import draft as drafts
from xtuner_hydra.sweeps import driver, multirun
from xtuner_hydra.sweeps.search import Listed

BASE = ("-m", "debug=fast", "tracking=none")
LRS = "optimizer.lr=1e-3,1e-4,1e-5"


class FakeJob:
    """Ends as `end` says at the first or second look: a loss, an error, a signal, or None to run until it is stopped."""

    def __init__(self, directory, end):
        self.directory, self.end, self.looks, self.stopped = directory, end, 0, False
        for name in ("checkpoints", "hf"):
            (directory / name / ".step-2.tmp").mkdir(parents=True, exist_ok=True)  # a save cut short: a retry may begin anew

    def poll(self):
        self.looks += 1
        if self.stopped:
            return self._write("interrupted", 130, {})
        if self.looks < 2 or self.end is None:
            return None
        if isinstance(self.end, str):
            return self._write("failed", 1, {}, error=self.end)
        if isinstance(self.end, signal.Signals):
            return -self.end
        rows = [{"train/step": 2, "train/loss": 1.0, "train/total_tokens": 400}]
        rows.append({"train/step": 2, "train/total_tokens": 400, "eval/loss": self.end, "eval/tokens": 7})
        (self.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self._write("completed", 0, rows[1])

    def _write(self, state, code, metrics, **fields):
        run_dir.write_status(self.directory, state, exit_code=code, metrics=metrics, step=2, total_steps=2, **fields)
        return code

    def stop(self):
        self.stopped = True

    kill = stop


class FakeLauncher:
    """Jobs that end as `ends` says, in the order of their starts; raises KeyboardInterrupt instead of start number `interrupt`."""

    elsewhere, grace_seconds = False, 5

    def __init__(self, *ends, capacity=1, interrupt=None):
        self.ends, self.capacity, self.interrupt, self.started, self.orphans = list(ends), capacity, interrupt, [], {}

    def describe(self):
        return "fakes"

    def adopt(self, directory):
        return self.orphans.pop(directory.name, None)

    def start(self, directory):
        if len(self.started) == self.interrupt:
            raise KeyboardInterrupt
        self.started.append(directory.name)
        return FakeJob(directory, self.ends.pop(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(multirun, "write_sweep", lambda directory: None)  # pictures after every job: half of the time


def run(directory, launcher, *overrides, plan=None, swept=LRS, search=None):
    """(exit code, the result) of a sweep whose jobs `launcher` runs."""
    with App([*BASE, swept, *overrides, f"hydra.sweep.dir={directory}"]) as app:
        draft = drafts.draft(app, directory)
        directory.mkdir(exist_ok=True)
        plan = plan or multirun._new_plan(app, draft)
        if search is None:
            multirun._list_jobs(plan, draft.listed)
        code = multirun._driver(app, draft, plan, search or Listed(), launcher).run()
    return code, read_sweep(directory)


def kept(result):
    return [job.number for job in result.jobs if (result.directory / job.name / "checkpoints").exists()]


def test_jobs_end_in_an_answer_and_the_best_ones_checkpoint_stays(tmp_path, capsys):
    code, result = run(tmp_path / "sweep", FakeLauncher(2.0, 1.0, 3.0))
    assert code == 0
    assert (result.best_job.number, [job.value for job in result.jobs]) == (1, [2.0, 1.0, 3.0])
    assert kept(result) == [1]
    assert (result.plan.state, result.plan.total) == ("completed", 3)
    assert "job 1 (optimizer.lr=0.0001): completed, eval/loss 1.0000 (best so far)" in capsys.readouterr().out


@pytest.mark.parametrize(("keep", "stay"), [("all", [0, 1, 2]), ("none", [])])
def test_keep_says_whose_checkpoints_stay(tmp_path, keep, stay):
    _, result = run(tmp_path / "sweep", FakeLauncher(2.0, 1.0, 3.0), f"sweep.keep={keep}")
    assert kept(result) == stay


def test_maximize_turns_the_order_round(tmp_path):
    _, result = run(tmp_path / "sweep", FakeLauncher(2.0, 1.0, 3.0), "sweep.direction=maximize")
    assert (result.best_job.number, kept(result)) == (2, [2])


def test_a_failed_job_is_told_with_its_error_and_does_not_stop_the_others(tmp_path, capsys):
    code, result = run(tmp_path / "sweep", FakeLauncher(2.0, "step 1: NaN\nmore", 1.0))
    assert (code, [job.state for job in result.jobs]) == (1, ["completed", "failed", "completed"])
    assert "failed: step 1: NaN\n" in capsys.readouterr().out
    assert 1 in kept(result), "a failed job's checkpoints are needed to go on"


def test_a_job_that_is_refused_when_its_turn_comes_is_found_among_the_runs(tmp_path, monkeypatch):
    """A search's job may be impossible; of a list's the data or the disk may be gone."""
    create = driver.launch.create

    def refuse_one(prepared):
        if prepared.config.optimizer.lr == 1e-4:
            raise RefusedError("the disk is gone")
        create(prepared)

    monkeypatch.setattr(driver.launch, "create", refuse_one)
    code, result = run(tmp_path / "sweep", FakeLauncher(2.0, 1.0))
    assert (code, [job.state for job in result.jobs]) == (1, ["completed", "failed", "completed"])
    seen = glance(result.directory / result.jobs[1].name)
    assert (seen.state, seen.overrides, seen.error) == ("failed", ["optimizer.lr=0.0001"], "the disk is gone")


def test_a_job_that_the_driver_ended_before_it_could_say_so_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeJob, "_write", lambda self, *_, **__: -signal.SIGTERM)
    code, result = run(tmp_path / "sweep", FakeLauncher(None, 1.0, capacity=2, interrupt=1))
    assert (code, result.jobs[0].state) == (130, "interrupted")


def test_one_that_a_cluster_cancelled_before_it_had_begun_is_interrupted(tmp_path, monkeypatch):
    """submitit tells nothing but that it is gone."""
    monkeypatch.setattr(FakeJob, "_write", lambda self, *_, **__: 1)
    code, result = run(tmp_path / "sweep", FakeLauncher(None, 1.0, capacity=2, interrupt=1))
    assert (code, result.jobs[0].state) == (130, "interrupted")


class Hears(Listed):
    """Notes what it is told."""

    def __init__(self):
        self.told = []

    def tell(self, trial, value, *, pruned=False):
        self.told.append((value, pruned))


def test_a_resumed_sweep_tells_its_search_of_jobs_that_ended_without_it(tmp_path):
    _, before = run(tmp_path / "sweep", FakeLauncher(2.0, "an error", 3.0))
    search = Hears()
    run(tmp_path / "sweep", FakeLauncher(1.0), plan=before.plan, search=search)
    assert search.told == [(2.0, False), (3.0, False), (1.0, False)]


def test_a_job_killed_without_a_word_is_marked_failed(tmp_path):
    code, result = run(tmp_path / "sweep", FakeLauncher(2.0, signal.SIGKILL, 1.0))
    assert (code, result.jobs[1].state) == (1, "failed")
    assert "killed by signal 9 (out of memory?)" in result.jobs[1].error


def test_retries_start_a_failed_job_again_so_often(tmp_path):
    launcher = FakeLauncher("once", "twice", 2.0, "a", "b", "c", 1.0)
    code, result = run(tmp_path / "sweep", launcher, "sweep.retries=2")
    assert [job.job.attempts for job in result.jobs] == [3, 3, 1]
    assert [job.state for job in result.jobs] == ["completed", "failed", "completed"]
    assert code == 1


def test_fail_fast_ends_the_sweep_with_its_running_jobs(tmp_path):
    code, result = run(tmp_path / "sweep", FakeLauncher(None, "bad", capacity=2), "sweep.fail_fast=true")
    assert code == 1
    assert [job.state for job in result.jobs] == ["interrupted", "failed", "waiting"]
    assert "another job failed" in result.jobs[0].error


def test_after_ctrl_c_a_resumed_sweep_runs_what_has_no_result(tmp_path):
    code, result = run(tmp_path / "sweep", FakeLauncher(2.0, interrupt=1))
    assert (code, result.plan.state) == (130, "interrupted")
    launcher = FakeLauncher(1.0, 3.0)
    code, result = run(tmp_path / "sweep", launcher, plan=SweepPlan.load(tmp_path / "sweep"))
    assert (code, launcher.started) == (0, [job.name for job in result.jobs[1:]])
    assert [job.value for job in result.jobs] == [2.0, 1.0, 3.0]


def test_jobs_are_known_by_what_they_are_not_by_their_number(tmp_path):
    """The same values in another order, with one more: what is done is found under its old name."""
    run(tmp_path / "sweep", FakeLauncher(2.0, 1.0, "failed"))
    launcher = FakeLauncher(0.5, 0.7)
    code, result = run(tmp_path / "sweep", launcher, swept="optimizer.lr=1e-5,1e-6,1e-4,1e-3", plan=SweepPlan.load(tmp_path / "sweep"))
    assert code == 0
    assert [job.value for job in result.jobs] == [0.5, 0.7, 1.0, 2.0]
    assert [job.number for job in result.jobs] == [2, 3, 1, 0]
    assert result.jobs[1].name == "3_lr1e-06"


def test_a_job_that_runs_elsewhere_already_is_adopted_not_started_again(tmp_path):
    run(tmp_path / "sweep", FakeLauncher(2.0, interrupt=1))
    plan, launcher = SweepPlan.load(tmp_path / "sweep"), FakeLauncher(3.0)
    orphan = tmp_path / "sweep" / plan.jobs[1].name
    launcher.orphans[orphan.name] = FakeJob(orphan, 1.0)
    with App([*BASE, LRS]) as app:
        run_dir.write_config(orphan, drafts.compose(app, ["debug=fast"], plan.jobs[1].overrides, 1, tmp_path / "sweep").config)
        (orphan / "overrides.yaml").write_text("[]")
    code, result = run(tmp_path / "sweep", launcher, plan=plan)
    assert (code, launcher.started) == (0, [plan.jobs[2].name])
    assert [job.value for job in result.jobs] == [2.0, 1.0, 3.0]


class Repeating:
    """A search that draws the same two jobs in turn."""

    def __init__(self):
        self.told, self.trial = {}, -1

    def ask(self):
        self.trial += 1
        return self.trial, [f"optimizer.lr=1e-{3 + self.trial % 2}"]

    def is_hopeless(self, trial, tokens, value):
        return False

    def tell(self, trial, value, *, pruned=False):
        self.told[trial] = value


def test_a_search_that_repeats_itself_trains_each_job_once_and_ends(tmp_path, capsys):
    search = Repeating()
    code, result = run(tmp_path / "sweep", FakeLauncher(2.0, 1.0), "sweep.search=random", "sweep.trials=5", search=search)
    assert (code, [job.value for job in result.jobs], result.plan.total) == (0, [2.0, 1.0], 2)
    assert search.told[2] == 2.0, "the result of a repeated draw is known"
    assert "the search only repeats earlier jobs" in capsys.readouterr().out


def test_a_full_disk_stops_the_jobs_and_is_said_in_a_sentence(tmp_path, monkeypatch):
    save, calls = SweepPlan.save, []

    def fill_up(self, directory):
        calls.append(directory)
        if len(calls) > 3:
            raise OSError(28, "No space left on device", str(directory / "sweep.json"))
        save(self, directory)

    monkeypatch.setattr(SweepPlan, "save", fill_up)
    with pytest.raises(TrainingError, match="No space left on device; the sweep stops"):
        run(tmp_path / "sweep", FakeLauncher(2.0, None, None, capacity=2))


def test_a_report_that_fails_does_not_cost_the_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multirun, "write_sweep", lambda directory: 1 / 0)
    code, _ = run(tmp_path / "sweep", FakeLauncher(2.0, 1.0, 3.0))
    assert code == 0
    assert "the report could not be written (ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_that_a_library_makes_an_error_of_its_own_stops_the_sweep_all_the_same(tmp_path, monkeypatch, number, code):
    """matplotlib's C++ takes a KeyboardInterrupt for a wrong argument."""

    def draw(directory):
        if read_sweep(directory).count("completed") == 1:
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                raise TypeError("incompatible function arguments") from None

    monkeypatch.setattr(multirun, "write_sweep", draw)
    launcher = FakeLauncher(2.0, None, 3.0)
    assert run(tmp_path / "sweep", launcher)[0] == code
    assert len(launcher.started) == 2


@pytest.mark.parametrize(("share", "reports"), [(1, [1, 2, 3, 3]), (1e-6, [1, 3])])
def test_a_report_is_written_after_a_job_as_long_as_it_takes_little_of_the_time(tmp_path, monkeypatch, share, reports):
    told = []
    monkeypatch.setattr(driver, "REPORT_SHARE", share)
    monkeypatch.setattr(multirun, "write_sweep", lambda directory: told.append(read_sweep(directory).count("completed")))
    run(tmp_path / "sweep", FakeLauncher(2.0, 1.0, 3.0))
    assert told == reports


def test_twins_run_once(tmp_path):
    with App([*BASE, "optimizer.lr=1e-3,0.001,1e-4"]) as app:
        draft = drafts.draft(app, tmp_path / "sweep")
    assert [one.twin for one in draft.jobs] == [None, 0, None]
    assert [job.number for job in draft.listed] == [0, 2]


def test_a_signature_ignores_what_does_not_change_a_job(tmp_path):
    def sign(*overrides):
        with App(["-m", "debug=fast", *overrides]) as app:
            return drafts.signature(app.compose(["debug=fast", *overrides]).config, app.defaults)

    assert sign() == sign("tracking=none", "data.num_workers=0", "checkpoint.resume=auto", "optimizer.lr=0.00006")
    assert len({sign(), sign("optimizer.lr=1e-4"), sign("trainer.seed=1"), sign("checkpoint.interval=2")}) == 4


@pytest.mark.parametrize("swept", ["optimizer.lr=1e-3,1e-4", "trainer.seed=interval(0,9)"])
def test_jobs_that_would_share_a_directory_are_refused(tmp_path, swept):
    search = ("sweep.search=random", "sweep.trials=3") if "interval" in swept else ()
    with pytest.raises(RefusedError, match=r"hydra\.sweep\.subdir: x is also the directory of job 0; include \$\{hydra\.job\.num\} in it"):
        run(tmp_path / "sweep", FakeLauncher(), "hydra.sweep.subdir=x", *search, swept=swept)


def test_drawn_jobs_whose_directories_would_be_one_get_two(tmp_path):
    drawn = iter([(0, ["optimizer.lr=0.0010001"]), (1, ["optimizer.lr=0.0010002"])])
    search = SimpleNamespace(ask=lambda: next(drawn, None), tell=lambda *_, **__: None, is_hopeless=lambda *_: False)
    overrides = ("sweep.search=random", "sweep.trials=2", 'hydra.sweep.subdir="lr${nearly:${optimizer.lr}}"')
    OmegaConf.register_new_resolver("nearly", lambda lr: f"{lr:.0e}", replace=True)
    launcher = FakeLauncher(2.0, 1.0)
    _, result = run(tmp_path / "sweep", launcher, *overrides, swept="optimizer.lr=interval(1e-4,1e-2)", search=search)
    assert launcher.started == ["lr1e-03", "1_lr1e-03"]
    assert [job.value for job in result.jobs] == [2.0, 1.0]


def test_the_checkpoint_where_a_job_begins_makes_another_job_of_it_and_the_jobs_own_one_goes_before_it(tmp_path):
    with App([*BASE, "trainer.seed=1,2"]) as app:
        starts = ["never", "auto", "a/checkpoints/step-2", "b/checkpoints/step-2"]
        jobs = [drafts.compose(app, [], [f"checkpoint.resume={start}"], 0, tmp_path) for start in starts]
        assert len({drafts.signature(job.config, app.defaults) for job in jobs}) == 3
    assert [drafts.continued(job).config.checkpoint.resume for job in jobs] == ["auto", "auto", *starts[2:]]
    committed = jobs[2].run_dir / "checkpoints" / "step-4"
    committed.mkdir(parents=True)
    (committed / "manifest.json").write_text("{}")
    assert drafts.continued(jobs[2]).config.checkpoint.resume == "auto"


def test_one_process_drives_a_sweep(tmp_path):
    (tmp_path / "sweep").mkdir()
    multirun._refuse_overtaken(tmp_path / "sweep", None)
    _, result = run(tmp_path / "sweep", FakeLauncher(2.0, 1.0, 3.0))
    with pytest.raises(RefusedError, match="holds a sweep already"):
        multirun._refuse_overtaken(tmp_path / "sweep", None)
    multirun._refuse_overtaken(tmp_path / "sweep", result.plan)
    with pytest.raises(RefusedError, match="has continued it in the meantime"):
        multirun._refuse_overtaken(tmp_path / "sweep", replace(result.plan, time=1.0))


def test_jobs_leave_who_runs_them_and_a_process_that_is_gone_is_dead(tmp_path):
    run_dir.write_status(tmp_path, "running")
    status = run_dir.read_status(tmp_path)
    assert status["process"]["pid"] == os.getpid()
    assert run_dir.state_of(tmp_path, status) == "running"
    for change in ({"started": "1"}, {"pid": 2**22 + 1}):
        assert run_dir.state_of(tmp_path, status | {"process": status["process"] | change}) == "killed"
    elsewhere = status | {"process": status["process"] | {"host": "elsewhere"}}
    assert run_dir.state_of(tmp_path, elsewhere) == "running"
    os.utime(tmp_path / "status.json", (1, 1))
    assert run_dir.state_of(tmp_path, elsewhere) == "killed"
