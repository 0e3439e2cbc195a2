"""`xtuner-hydra report`."""

import subprocess
import sys

import pytest
from runs import finished, make_run, make_sweep

from xtuner_hydra.errors import RefusedError
from xtuner_hydra.reports.sweep import FILES
from xtuner_hydra.tools.report import main


@pytest.fixture
def sweep(tmp_path):
    return make_sweep(tmp_path / "sweep", [({"optimizer.lr": lr}, finished(lr * 1e4)) for lr in (1e-4, 2e-4)])


def test_a_sweep_gets_its_files(sweep, capsys):
    assert main([str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "1 *  1e-4" in out
    assert all(f"wrote {sweep / name}" in out and (sweep / name).is_file() for name in FILES)


def test_a_run_gets_its_page(sweep, capsys):
    assert main([str(sweep / "0_job")]) == 0
    assert capsys.readouterr().out == f"wrote {sweep / '0_job' / 'report.html'}\n"
    assert "Completed after 3 steps" in (sweep / "0_job" / "report.html").read_text()


def test_several_are_compared_on_one_page(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "more" / "run", **finished(0.5, optimizer__lr=3e-4))
    assert main(["sweep", "more"]) == 0
    assert capsys.readouterr().out == "wrote comparison.html\n"
    assert "lr 3e-4 leads: eval/loss 0.50" in (tmp_path / "comparison.html").read_text()


def test_a_directory_of_runs_is_a_comparison_at_the_place_asked_for(sweep, tmp_path):
    (sweep / "sweep.json").unlink()
    assert main([str(sweep), "--to", str(tmp_path / "page.html")]) == 0
    assert "lr 1e-4 leads" in (tmp_path / "page.html").read_text()


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="there is no run in or below"):
        main([str(tmp_path)])
    with pytest.raises(RefusedError, match="is not a directory"):
        main([str(tmp_path / "gone")])


def test_a_run_that_cannot_be_read_is_left_out_and_named(sweep, tmp_path, capsys):
    (sweep / "0_job" / "config.yaml").write_text("optimizer: {no_such_key: 1}\n")
    assert main([str(sweep), "--to", str(tmp_path / "page.html")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "0_job: config.yaml cannot be read: optimizer.no_such_key" in line
    assert "1 job: 1 completed" in (tmp_path / "page.html").read_text()


def test_the_command_needs_no_torch(sweep):
    code = "import sys; from xtuner_hydra.__main__ import main; code = main(sys.argv[1:]); "
    code += "print(code, sorted({'torch', 'hydra', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, "report", str(sweep)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    done = subprocess.run([sys.executable, "-m", "xtuner_hydra", "report", str(sweep / "gone")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["sweep.html", "0_job/report.html"])
def test_what_cannot_be_written_is_said_in_a_sentence_after_the_answer(sweep, name, capsys):
    (sweep / name).mkdir()
    with pytest.raises(RefusedError, match=r"report.*: Is a directory; --to FILE writes elsewhere"):
        main([str((sweep / name).parent)])
    assert ("1 *  1e-4" in capsys.readouterr().out) == (name == "sweep.html")
