"""Main memory for training on a CPU: a malloc that keeps freed memory, found on the machine and preloaded before anything else is loaded; huge
pages; a small cache of kernels.

glibc's malloc returns large blocks to the system whenever they are freed; a training step frees and allocates gigabytes, and spends about half
of its time on page faults. tcmalloc and jemalloc keep the blocks. A library can be preloaded only into a new process, so the command line
replaces itself by the same command with LD_PRELOAD set, which costs some hundredths of a second. An LD_PRELOAD that is already set, empty or
not, is left alone.

Large tensors are put on pages of 2 MB if the kernel gives them on request (`madvise`, as most distributions set it): the same memory with a
five-hundredth of the page faults, and a processor's translation buffers cover all of a weight."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LIBRARIES = {"tcmalloc": ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"), "jemalloc": ("libjemalloc.so.2",)}
"""Libraries to look for, the best one first."""
SETTINGS = {"jemalloc": {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}}
"""Settings that make a library keep its memory."""
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Makes torch request huge pages for tensors larger than one page; torch reads it when it makes its first tensor."""
KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""For how many shapes of matrix products oneDNN, and torch's layer over it, keep code and memory, instead of 1,024; read at the first one."""
HOW_TO_GET_ONE = "apt install libtcmalloc-minimal4, or conda install gperftools"


def preload() -> None:
    """Replace this process by itself with a better malloc, if there is one and nothing was preloaded. Returns otherwise, with huge pages
    requested unless the environment already sets them.

    Does nothing if there is a GPU, as host memory does not matter then."""
    if sys.platform != "linux" or Path("/dev/nvidia0").exists():
        return
    for name, value in huge_pages().items():
        os.environ.setdefault(name, value)
    if "LD_PRELOAD" in os.environ or not sys.orig_argv or (library := find()) is None:
        return
    os.execve(sys.executable, sys.orig_argv, {**environment(*library), **os.environ})


def environment(name: str, path: Path) -> dict[str, str]:
    """The environment variables with which a process uses the library `name`."""
    return SETTINGS.get(name, {}) | {"LD_PRELOAD": str(path)}


def huge_pages() -> dict[str, str]:
    """The environment of a process whose tensors are to be on huge pages; empty if the kernel gives none, or gives them unasked."""
    return HUGE_PAGES if _kernel_setting() == "madvise" else {}


def _kernel_setting() -> str:
    """Who gets huge pages: `always`, `madvise`, `never`; `unknown` if the kernel does not say."""
    try:
        return KERNEL_SETTING.read_text().partition("[")[2].partition("]")[0] or "unknown"
    except OSError:
        return "unknown"


def keep_few_kernels() -> None:
    """Keep memory for the shapes of one pack's products (some twenty in a dense model) instead of fifty packs', about 0.5 MB each: a shape
    recurs only with a pack of the same length. Not for experts, whose few tokens often give the same shapes. To be called before the first
    matrix product of a process."""
    for name, value in KERNELS.items():
        os.environ.setdefault(name, value)


def find() -> tuple[str, Path] | None:
    """(name, file) of the best library on this machine, None if there is none."""
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
        how = f"{library[0]} is on this machine, but LD_PRELOAD={os.environ.get('LD_PRELOAD', '')} excludes it"
    return f"training on a CPU is much faster with another malloc: {how}"


def pages() -> str:
    """Which part of this process is on huge pages, for a log."""
    asked = all(os.environ.get(name) == value for name, value in HUGE_PAGES.items())
    return {"always": "everything", "madvise": "large tensors" if asked else "none"}.get(_kernel_setting(), "none")


def active() -> str | None:
    """`tcmalloc` or `jemalloc` if this process runs with it."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return next((name for name in LIBRARIES if f"lib{name}" in maps), None)
