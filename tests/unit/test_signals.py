"""Signals before anything has begun."""

import signal
import subprocess
import sys

import pytest

BEGIN = "from xtuner_hydra.signals import end_at_once; end_at_once(); print('ready', flush=True); import time; time.sleep(60)"


def process(hangup):
    """One that has begun to end at signals; `hangup`: how it was started to take SIGHUP."""
    began = subprocess.Popen(
        [sys.executable, "-c", BEGIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    )
    assert began.stdout.readline() == "ready\n"
    return began


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_with_its_code_and_a_sentence(number, code):
    began = process(signal.SIG_DFL)
    began.send_signal(number)
    _, err = began.communicate(timeout=30)
    assert (began.returncode, err) == (code, "xtuner_hydra: stopped by a signal; there was nothing to save\n")


def test_under_nohup_the_loss_of_a_terminal_is_none():
    began = process(signal.SIG_IGN)
    began.send_signal(signal.SIGHUP)
    began.send_signal(signal.SIGTERM)
    began.communicate(timeout=30)
    assert began.returncode == 75
