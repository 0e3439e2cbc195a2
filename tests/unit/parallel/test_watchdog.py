"""Who hangs: whoever gives no sign, else whoever is behind, else whoever does not wait for others."""

import json
import subprocess
import sys

import pytest

from xtuner_hydra.parallel.watchdog import describe, verdict


def report(edges, *, waits=True):
    return {"edges": edges, "waits": waits, "where": 'File "engine.py", line 3,\n    in step', "stack": "..."}


@pytest.mark.parametrize(
    ("reports", "culprits"),
    [
        ({0: report(7), 2: report(7)}, [1]),
        ({}, [0, 1, 2]),
        ({0: report(7), 1: report(6, waits=False), 2: report(7)}, [1]),
        ({0: report(7), 1: report(6), 2: report(7, waits=False)}, [1]),
        ({0: report(7), 1: report(7), 2: report(7, waits=False)}, [2]),
        ({0: report(7), 1: report(7), 2: report(7)}, [0, 1, 2]),
    ],
    ids=[
        "no sign",
        "no signs at all",
        "behind",
        "behind counts more than waiting",
        "equal, one waits for nobody",
        "nothing tells them apart",
    ],
)
def test_the_verdict(reports, culprits):
    assert verdict(reports, 3) == culprits


def test_the_sentence_names_rank_time_and_place():
    assert (
        describe([1], {1: report(6)}, 30)
        == 'rank 1 hangs: no progress for 30 s (parallelism.timeout), in File "engine.py", line 3, in step'
    )
    assert "gave no sign of life" in describe([1, 2], {0: report(7)}, 30)
    assert "as do ranks 2" in describe([1, 2], {0: report(7)}, 30)


PROGRAM = """
import sys, time
from pathlib import Path
from xtuner_hydra.parallel.watchdog import Watchdog
logs, rank, hangs = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "hangs"
edges = 0
def tell(rank, error, stack):
    (logs / "verdict").write_text(f"{rank}\\n{error}\\n{stack}")
def sleeping_rank():
    time.sleep(60)
with Watchdog(logs, rank, 2, 1.0, lambda: edges, tell):
    for edges in range(1, 16):
        time.sleep(0.1)
        if hangs and edges == 10:
            sleeping_rank()
    edges += 1
    time.sleep(60 if sys.argv[3] != "ends" else 0)
"""


def test_two_processes_agree_on_the_one_that_is_behind(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path, str(rank), word]) for rank, word in enumerate(["waits", "hangs"])]
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    rank, error, stack = (tmp_path / "verdict").read_text().split("\n", 2)
    assert rank == "1"
    assert error.startswith("rank 1 hangs: no progress for 1 s")
    assert "sleeping_rank" in stack
    edges = [json.loads((tmp_path / f"rank{rank}.stuck.json").read_text())["edges"] for rank in (0, 1)]
    assert edges == [16, 10]


GPU_PROGRAM = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from xtuner_hydra.parallel.watchdog import Watchdog, read_back
logs, rank, hangs = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "hangs"
def tell(rank, error, stack):
    (logs / "verdict").write_text(str(rank))
with Watchdog(logs, rank, 2, 1.0, lambda: 7, tell):
    time.sleep(60) if hangs else read_back(SimpleNamespace(tolist=lambda: time.sleep(60)))
"""


def test_who_waits_for_numbers_of_a_collective_operation_is_told_from_who_keeps_the_others_waiting(tmp_path):
    words = ["waits", "hangs"]
    ranks = [subprocess.Popen([sys.executable, "-c", GPU_PROGRAM, tmp_path, str(rank), word]) for rank, word in enumerate(words)]
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    assert (tmp_path / "verdict").read_text() == "1"


def test_who_makes_progress_is_left_alone(tmp_path):
    rank = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path, "0", "ends"], timeout=60)
    assert rank.returncode == 0
    assert not list(tmp_path.iterdir())


PAUSE = """
import sys, time
from pathlib import Path
from xtuner_hydra.parallel import watchdog
watchdog.GRACE_SECONDS = 3
edges = 0
with watchdog.Watchdog(Path(sys.argv[1]), 0, 2, 1.0, lambda: edges, lambda *verdict: None):
    time.sleep(2.5)
    for edges in range(1, 40):
        time.sleep(0.1)
"""


def test_who_moves_on_while_the_ranks_report_is_left_alone(tmp_path):
    assert subprocess.run([sys.executable, "-c", PAUSE, tmp_path], timeout=60).returncode == 0
    assert not list(tmp_path.iterdir())
