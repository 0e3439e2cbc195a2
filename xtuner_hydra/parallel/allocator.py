"""A malloc that keeps its memory, for training on a CPU: found on the machine and preloaded before anything else is loaded.

glibc's malloc gives large blocks back to the system whenever they are freed; a training step frees and takes gigabytes, and about half of its
time goes into page faults. tcmalloc and jemalloc keep them. A library can be preloaded only into a new process, so the command line replaces
itself by the same command with LD_PRELOAD set, which costs some hundredths of a second. An LD_PRELOAD that is set already, empty or not, is left
alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LIBRARIES = {"tcmalloc": ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"), "jemalloc": ("libjemalloc.so.2",)}
"""What is looked for, the best one first."""
SETTINGS = {"jemalloc": {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}}
"""What a library needs to be told to keep its memory."""
HOW_TO_GET_ONE = "apt install libtcmalloc-minimal4, or conda install gperftools"


def preload() -> None:
    """Replace this process by itself with a better malloc, where there is one and nothing was preloaded. Returns otherwise.

    Not where there is a GPU: there the host's malloc does not matter."""
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ or Path("/dev/nvidia0").exists() or not sys.orig_argv:
        return
    if (library := find()) is None:
        return
    name, path = library
    environment = {**SETTINGS.get(name, {}), **os.environ, "LD_PRELOAD": str(path)}
    os.execve(sys.executable, sys.orig_argv, environment)


def find() -> tuple[str, Path] | None:
    """(name, file) of the best library on this machine, None where there is none."""
    return next(iter(found().items()), None)


def found() -> dict[str, Path]:
    """The file of each library that this machine has, by name, the best one first."""
    usual = map(Path, ("/usr/local/lib", "/usr/lib64", "/usr/lib", "/lib64"))
    folders = [Path(sys.prefix) / "lib", *usual, *sorted(Path("/usr/lib").glob("*-linux-gnu"))]
    candidates = {name: [folder / file for folder in folders for file in files] for name, files in LIBRARIES.items()}
    return {name: path for name, paths in candidates.items() if (path := next((one for one in paths if one.exists()), None))}


def advice() -> str:
    """What to do in a process that runs with the system's malloc."""
    if (library := find()) is None:
        how = HOW_TO_GET_ONE
    else:
        how = f"{library[0]} is on this machine, but LD_PRELOAD={os.environ.get('LD_PRELOAD', '')} leaves it out"
    return f"training on a CPU is much faster with another malloc: {how}"


def active() -> str | None:
    """`tcmalloc` or `jemalloc` where this process runs with it."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return next((name for name in LIBRARIES if f"lib{name}" in maps), None)
