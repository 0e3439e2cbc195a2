"""environment.json: what a run was made with. Environment variables are left out, because they hold secrets; if the command line or the
diff contains one of their values, it is hidden."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xtuner_hydra import __version__
from xtuner_hydra.machine import lines, memory_gb
from xtuner_hydra.safe_text import redact

PACKAGES = ("torch", "hydra-core", "omegaconf", "safetensors", "numpy", "transformers", "tensorboard", "wandb", "matplotlib")
DIFF_BYTES = 1 << 20
"""A longer diff is cut here: a generated file must not bloat every run directory."""


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Versions, hardware, git state of the caller's repository (of the working directory), command line, time."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": redact(_command(argv)),
        "directory": os.getcwd(),
        "versions": {"xtuner_hydra": __version__, "python": platform.python_version(), **_versions()},
        "git": _git(),
        "hardware": {"host": socket.gethostname(), "system": platform.platform(), **_cpu(), "gpus": _gpus()},
        "executable": sys.executable,
    }


def _command(argv: Sequence[str]) -> str:
    """The command line as one would type it."""
    program, *arguments = argv or [""]
    module = Path(program).parent.name if Path(program).name == "__main__.py" else None
    return f"python -m {module} {shlex.join(arguments)}".rstrip() if module else shlex.join([Path(program).name, *arguments])


def _versions() -> dict[str, str | None]:
    return {name.partition("-")[0]: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit, and the diff of tracked files against it; None outside a repository."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _output("git", "diff", "--no-color", "--no-ext-diff", "HEAD") or ""
    return {"commit": commit, "dirty": bool(diff), "diff": redact(diff)[:DIFF_BYTES]}


def _cpu() -> dict[str, Any]:
    model = next((line.partition(":")[2].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "memory_gb": round(memory_gb(), 1)}


def _gpus() -> list[str]:
    """Name, memory and driver of each GPU, as nvidia-smi lists them."""
    return (_output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") or "").splitlines()


def _output(*command: str) -> str | None:
    """The output of a command; None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace").strip()
