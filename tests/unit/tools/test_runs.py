"""runs lists what is there, with typed comparisons, in any width, and names what nobody knows."""

import json
import os
import pty
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from run_dirs import make_run

from xtuner_hydra.__main__ import main


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Two runs, one job of a sweep, one damaged run."""
    monkeypatch.chdir(tmp_path)
    day = tmp_path / "outputs" / "2026-01-01"
    make_run(day / "10-00-00-000000_one", lr=6e-5)
    make_run(
        day / "11-00-00-000000_two",
        lr=2e-4,
        state="failed",
        losses=[5.0],
        overrides=["optimizer.lr=2e-4", "data.path=/far/away/chats.jsonl"],
    )
    make_run(tmp_path / "outputs" / "sweeps" / "s" / "0_lr0.001", lr=1e-3, losses=[4.0])
    make_run(day / "12-00-00-000000_three")
    (day / "12-00-00-000000_three" / "status.json").write_text("{")
    return tmp_path / "outputs"


@pytest.fixture
def listed(outputs, capsys):
    """The runs' names that a command line lists."""

    def names(*arguments):
        capsys.readouterr()
        assert main(["runs", *arguments, "--json"]) == 0
        return [run["run"].rpartition("_")[2].rpartition("/")[2] for run in json.loads(capsys.readouterr().out)]

    return names


def test_every_run_takes_a_line_with_how_it_stands(outputs, capsys):
    assert main(["runs"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "steps", "train/loss", "eval/loss", "tokens/s", "overrides"]
    assert [line.split()[:2] for line in lines] == [
        ["outputs/2026-01-01/10-00-00-000000_one", "completed"],
        ["outputs/2026-01-01/11-00-00-000000_two", "failed"],
        ["outputs/2026-01-01/12-00-00-000000_three", "damaged"],
        ["outputs/sweeps/s/0_lr0.001", "completed"],
    ]
    assert lines[0].split()[2:] == ["2/2", "2.0000", "0.6000", "100.0", "lr=6e-05"]
    assert lines[1].endswith("lr=2e-4 path=chats.jsonl")
    assert "status.json" in lines[2]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["optimizer.lr=0.00006"], ["one"]),
        (["optimizer.lr=6e-5"], ["one"]),
        (["optimizer.lr!=6e-5"], ["two", "lr0.001"]),
        (["optimizer.lr>6e-5"], ["two", "lr0.001"]),
        (["optimizer.lr>=6e-5", "optimizer.lr<0.001"], ["one", "two"]),
        (["state=failed"], ["two"]),
        (["state=damaged"], ["three"]),
        (["train/loss<=4"], ["one", "lr0.001"]),
        (["optimizer.betas=[0.9, 0.95]", "state!=failed"], ["one", "lr0.001"]),
        (["trainer.seed=42.0", "step=1"], ["two", "lr0.001"]),
        (["data.eval_path=null", "optimizer.decay_all=false"], ["one", "two", "lr0.001"]),
        (["optimizer.decay_all=0"], []),
        (["data.path=/data/train.jsonl"], ["one", "two", "lr0.001"]),
        (["optimizer.name>3"], []),
    ],
)
def test_conditions_compare_values_not_texts(listed, conditions, expected):
    assert listed(*(word for condition in conditions for word in ("--where", condition))) == expected


def test_sorting_is_by_value_and_what_has_none_comes_last(listed):
    assert listed("--sort", "train/loss") == ["one", "lr0.001", "two", "three"]
    assert listed("--sort", "optimizer.lr") == ["one", "two", "lr0.001", "three"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "optimizer.lrr=1"], "optimizer.lrr: there is no such key. Did you mean optimizer.lr?"),
        (["--where", "optimizer=adamw"], "optimizer: a group, not a value; choose one of optimizer.name"),
        (["--where", "eval/los<1"], "eval/los: none of the runs has this metric. Did you mean eval/loss?"),
        (["--where", "stat=failed"], "Did you mean state?"),
        (["--where", "optimizer.lr"], "write KEY=VALUE"),
        (["--where", "optimizer.lr>high"], "> compares numbers, and high is none"),
        (["--sort", "optimizer.lrr"], "Did you mean optimizer.lr?"),
        (["nowhere"], "nowhere: no such directory"),
    ],
)
def test_what_nobody_knows_is_refused_by_name(outputs, capsys, arguments, message):
    assert main(["runs", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_runs_is_said(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", f"no runs in {tmp_path}\n")


def test_a_run_whose_process_is_gone_is_killed(outputs, capsys):
    run = make_run(outputs / "gone", state="running")
    status = json.loads((run / "status.json").read_text())
    status["process"]["started"] = "long ago"
    (run / "status.json").write_text(json.dumps(status))
    assert main(["runs", str(run), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["state"], told["metrics"]["train/loss"]) == ("killed", 2.0)


@pytest.mark.parametrize(("columns", "stacked"), [(60, True), (120, False), (200, False)])
def test_a_terminal_is_not_overrun(outputs, columns, stacked):
    """In a terminal of its own of that width."""
    main_end, other_end = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-m", "xtuner_hydra", "runs"], stdout=other_end, env=environment, cwd=outputs.parent)
    os.close(other_end)
    text = b""
    try:
        while part := os.read(main_end, 4096):
            text += part
    except OSError:  # the end of a terminal, on Linux
        pass
    assert process.wait(20) == 0
    lines = text.decode().splitlines()
    assert max(map(len, lines)) <= columns
    assert ("outputs/2026-01-01/10-00-00-000000_one" in lines) == stacked


def test_hundreds_of_runs_take_about_a_second_and_no_torch(tmp_path):
    make_run(tmp_path / "0")
    for number in range(1, 300):
        (tmp_path / str(number)).mkdir()
        for file in (tmp_path / "0").glob("*.*"):
            os.link(file, tmp_path / str(number) / file.name)
    code = "import sys; from xtuner_hydra.__main__ import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "runs", str(tmp_path), "--where", "optimizer.lr=6e-5"]
    before = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert time.monotonic() - before < 15  # a second on an idle machine
    assert len(done.stdout.splitlines()) == 301
    assert not {"torch", "hydra", "transformers", "wandb", "matplotlib"} & set(done.stderr.split())


def test_a_reader_that_has_seen_enough_is_no_error(outputs):
    command = f"{sys.executable} -m xtuner_hydra runs --json | head -1"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, cwd=outputs.parent)
    assert (done.stdout, done.stderr) == ("[\n", "")
