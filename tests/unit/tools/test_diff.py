"""diff finds what differs, says in a line what does not, and where two runs part."""

import pytest
from run_dirs import make_run

from xtuner_hydra.__main__ import main
from xtuner_hydra.results.run import load_run
from xtuner_hydra.tools.diff import compare, first_difference


@pytest.fixture
def compared(tmp_path):
    """The lines that compare a run with another made like it, but for `changes`."""

    def lines(**changes):
        a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes)
        return list(compare(load_run(a), load_run(b)))

    return lines


def test_equal_runs_take_a_line_a_part(compared):
    lines = compared()
    for part in ("config", "environment", "code", "data"):
        assert sum(line.startswith(f"{part}: equal") for line in lines) == 1
    assert "metrics: train/loss is equal, bit for bit, at all 2 steps that both have logged" in lines
    assert not any("->" in line for line in lines)


def test_a_changed_value_is_told_by_key(compared):
    lines = compared(lr=2e-4)
    assert "config: 1 differ" in lines
    assert "  optimizer.lr  6e-05 -> 0.0002" in lines


def test_environment_differs_by_what_computes(compared):
    lines = compared(environment={"versions": {"torch": "2.12.0", "xtuner_hydra": "0.1.0"}, "threads": 4, "command": "elsewhere"})
    assert [line for line in lines if "->" in line] == ["  torch    2.13.0 -> 2.12.0", "  threads  1 -> 4"]


def test_code_differs_by_commit_and_by_what_is_not_committed(compared):
    lines = compared(environment={"git": {"commit": "c" * 40, "dirty": True, "diff": "--- x\n+new line"}})
    assert "code: differs" in lines
    assert "    ++new line" in lines
    assert not any("->" in line for line in lines)
    lines = compared(environment={"git": {"commit": "d" * 40, "dirty": False, "diff": ""}})
    assert f"  commit  {'c' * 40} -> {'d' * 40}" in lines


def test_a_long_difference_of_the_code_is_counted_not_shown(compared):
    lines = compared(environment={"git": {"commit": "c" * 40, "dirty": True, "diff": "\n".join(f"+{n}" for n in range(100))}})
    assert "  uncommitted changes differ: 0 lines in a, 100 in b (git.diff in environment.json)" in lines


def test_data_differs_by_content_not_by_place(compared):
    assert any(line.startswith("data: equal") for line in compared(files=[("/moved/a", "hash")]))
    lines = compared(files=[("/data/a", "other")])
    assert "  train /data/a      hash -> other" in lines


@pytest.mark.parametrize(
    ("losses", "parted"),
    [([3.0, 2.0], None), ([3.0, 2.5], (2, 2.0, 2.5)), ([3.0, 2.0, 1.0], None), ([2.9, 2.0], (1, 3.0, 2.9)), ([3.0, None], None)],
)
def test_the_first_step_at_which_two_runs_part(tmp_path, losses, parted):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", losses=losses)
    assert first_difference(load_run(a), load_run(b)) == parted


def test_metrics_stand_side_by_side_with_their_difference(compared):
    lines = compared(losses=[3.0, 2.5])
    assert "metrics: train/loss differs first at step 2: 2.0 -> 2.5 (+0.5)" in lines
    (loss,) = [line.split() for line in lines if line.startswith("  train/loss ")]
    assert loss == ["train/loss", "2", "2.5", "+0.5", "(+25.00%)"]


def test_the_exit_code_tells_of_trouble_not_of_differences(tmp_path, capsys):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=1.0)
    assert main(["diff", str(a), str(b)]) == 0
    assert "optimizer.lr  6e-05 -> 1.0" in capsys.readouterr().out
    assert main(["diff", str(a), str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
