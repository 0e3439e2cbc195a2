"""`doctor`: whether this machine can train, what is missing, and how to get it. Exit code 1 when something needed is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from xtuner_hydra.errors import EXIT_DONE, EXIT_FAILED, RefusedError
from xtuner_hydra.machine import cores, memory_gb
from xtuner_hydra.parallel import allocator

OLDEST_DRIVER = "550.127.08"
"""Drivers must be newer than this one, which XTuner's installation page names."""
LOW_DISK_GB = 20
LOW_MEMORY_GB = 8


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands (`ok`, `note`, `missing`), and what was found or is to be done."""

    name: str
    state: str
    text: str


def main(argv: list[str]) -> int:
    """Print every check; 1 where one is `missing`."""
    if argv in (["-h"], ["--help"]):
        print("usage: xtuner-hydra doctor\n\nLook at this machine: what training needs, what would make it faster, and what is missing.")
        return EXIT_DONE
    if argv:
        raise RefusedError(f"doctor: takes no arguments, got {' '.join(argv)}")
    failed = False
    for look in CHECKS:
        check = look()
        failed |= check.state == "missing"
        print(f"{check.state:<8}{check.name:<12}{check.text}")
    print("\nsomething that training needs is missing" if failed else "\nready to train")
    return EXIT_FAILED if failed else EXIT_DONE


def python() -> Check:
    """The interpreter."""
    return Check("Python", "ok" if sys.version_info >= (3, 11) else "missing", f"{platform.python_version()} (3.11 or newer is needed)")


def packages() -> Check:
    """What pyproject.toml asks for, at what versions."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("xtuner-hydra") or []]
    except PackageNotFoundError:
        return Check("packages", "note", "xtuner_hydra runs from a checkout; `pip install -e .` lets pip keep its packages right")
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [
        f"{one} (found {found or 'none'})"
        for one in needed
        if (found := _version(one.name)) is None or not one.specifier.contains(found, prereleases=True)
    ]
    if wrong:
        return Check("packages", "missing", f"{'; '.join(wrong)}. Install with: pip install -c constraints.txt -e .")
    return Check("packages", "ok", ", ".join(f"{one.name} {_version(one.name)}" for one in needed))


def device() -> Check:
    """What torch computes on."""
    torch = _torch()
    if torch is None:
        return Check("device", "missing", "torch cannot be imported")
    if torch.cuda.is_available():
        return Check("device", "ok", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Check(
            "device",
            "note",
            f"CPU only: torch {torch.__version__} is built without CUDA, though this machine has a GPU. See pytorch.org for one with",
        )
    return Check("device", "ok", f"CPU, {cores()} cores; no GPU that torch can use")


def driver() -> Check:
    """NVIDIA's driver, where there is one."""
    if shutil.which("nvidia-smi") is None:
        return Check("driver", "ok", "no NVIDIA GPU here, none needed")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]
        new_enough = _numbers(found) > _numbers(OLDEST_DRIVER)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        return Check("driver", "missing", f"nvidia-smi does not answer ({error}); reinstall the NVIDIA driver")
    text = f"NVIDIA {found}"
    return (
        Check("driver", "ok", text)
        if new_enough
        else Check("driver", "missing", f"{text}; update it, it must be newer than {OLDEST_DRIVER}")
    )


def communication() -> Check:
    """Backends for several ranks."""
    torch = _torch()
    if torch is None or not torch.distributed.is_available():
        return Check("ranks", "missing", "torch.distributed is not in this build of torch")
    dist = torch.distributed
    backends = [name for name, there in (("NCCL", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    needed = "NCCL" if torch.cuda.is_available() else "gloo"
    if needed not in backends:
        return Check("ranks", "missing", f"{needed} is not in this build of torch")
    return Check("ranks", "ok", ", ".join(backends))


def bf16() -> Check:
    """Whether the device multiplies bf16 fast, which param_dtype=auto asks."""
    if _torch() is None:
        return Check("bf16", "missing", "torch cannot be imported")
    from xtuner_hydra.parallel.runtime import param_dtype

    fast = param_dtype("auto", "auto") == "bfloat16"
    return Check("bf16", "ok" if fast else "note", "fast" if fast else "slow on this device; param_dtype=auto computes in float32")


def malloc() -> Check:
    """The memory allocator of runs on a CPU."""
    if (name := allocator.active()) is not None:
        return Check("malloc", "ok", f"{name}; on huge pages: {allocator.pages()}")
    return Check("malloc", "note", f"the system's; {allocator.advice()}")


def memory() -> Check:
    """Main memory."""
    total = memory_gb()
    text = f"{total:.1f} GB"
    return (
        Check("memory", "ok", text)
        if total >= LOW_MEMORY_GB
        else Check("memory", "note", f"{text}; the main job wants about {LOW_MEMORY_GB} GB")
    )


def disk() -> Check:
    """Room for runs in the working directory."""
    free = shutil.disk_usage(".").free / 2**30
    enough = free >= LOW_DISK_GB
    hint = "" if enough else "; checkpoint=none saves nothing, `plan` says what a run writes"
    return Check("disk", "ok" if enough else "note", f"{free:.1f} GB free in {os.getcwd()}{hint}")


def wandb_key() -> Check:
    """Whether W&B runs go online."""
    from xtuner_hydra.tracking.wandb import has_api_key

    return Check("W&B", "ok", "online (an API key is there)" if has_api_key() else "offline runs; `wandb login` to send them as they come")


def optional() -> Check:
    """What development needs and training does not."""
    names = {"pytest": "tests", "ruff": "style", "mypy": "types", "hypothesis": "tests"}
    missing = [f"{name} ({use})" for name, use in names.items() if find_spec(name) is None]
    text = f"without {', '.join(missing)}; pip install -e '.[dev]' brings them" if missing else "all there"
    return Check("optional", "note" if missing else "ok", text)


CHECKS: list[Callable[[], Check]] = [python, packages, device, driver, communication, bf16, malloc, memory, disk, wandb_key, optional]


def _torch():  # type: ignore[no-untyped-def]
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
