"""Signals before anything has begun."""

import signal
import subprocess
import sys

import pytest

BEGIN = "from xtuner_hydra.signals import end_at_once; end_at_once(); print('ready', flush=True); import time; time.sleep(60)"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_with_its_code_and_a_sentence(number, code):
    process = subprocess.Popen([sys.executable, "-c", BEGIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, "xtuner_hydra: stopped by a signal; there was nothing to save\n")
