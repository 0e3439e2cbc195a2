"""What is printed cannot fail a run."""

import subprocess
import sys

import pytest


def run(code, **streams):
    begin = "import sys; from xtuner_hydra.streams import make_lasting; make_lasting(); "
    return subprocess.run([sys.executable, "-c", begin + code], stderr=subprocess.PIPE, text=True, timeout=60, **streams)


def test_a_full_disk_loses_the_output_and_says_so_once():
    with open("/dev/full", "w") as full:
        done = run("[print('x' * 10_000, flush=True) for _ in range(3)]; print('on', file=sys.stderr)", stdout=full)
    assert done.returncode == 0
    assert done.stderr == "xtuner_hydra: output cannot be written (No space left on device); nothing more is printed there\non\n"


def test_a_reader_that_has_gone_is_told_from_it():
    process = subprocess.Popen(
        [sys.executable, "-c", "from xtuner_hydra.streams import make_lasting; make_lasting()\nwhile True: print('x' * 1000)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert "BrokenPipeError" in process.communicate(timeout=60)[1]


@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
def test_characters_that_a_terminal_lacks_are_written_as_escapes(unbuffered):
    code = "from xtuner_hydra.streams import make_lasting; make_lasting(); print('\\u27e6\\xe9')"
    environment = {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, *unbuffered, "-c", code], env=environment, capture_output=True, timeout=60)
    assert done.stdout == b"\\u27e6\xe9\n", done.stderr
