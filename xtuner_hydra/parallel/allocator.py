"""Main memory for training on a CPU: a malloc that keeps it, found on the machine and preloaded before anything else is loaded; huge pages; a
small cache of kernels.

glibc's malloc gives large blocks back to the system whenever they are freed; a training step frees and takes gigabytes, and about half of its
time goes into page faults. tcmalloc and jemalloc keep them. A library can be preloaded only into a new process, so the command line replaces
itself by the same command with LD_PRELOAD set, which costs some hundredths of a second. An LD_PRELOAD that is set already, empty or not, is left
alone.

The large tensors are put on pages of 2 MB where the kernel gives them to who asks (`madvise`, as most distributions set it): the same memory
with a five-hundredth of the page faults, and a processor's translation buffers reach all of a weight."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LIBRARIES = {"tcmalloc": ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"), "jemalloc": ("libjemalloc.so.2",)}
"""What is looked for, the best one first."""
SETTINGS = {"jemalloc": {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}}
"""What a library needs to be told to keep its memory."""
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Has torch ask for huge pages for what is larger than one; torch reads it when it makes its first tensor."""
KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""How many shapes of products oneDNN, and torch's layer over it, keep code and scratch memory for, instead of 1,024; read at the first product."""
HOW_TO_GET_ONE = "apt install libtcmalloc-minimal4, or conda install gperftools"


def preload() -> None:
    """Replace this process by itself with a better malloc, where there is one and nothing was preloaded. Returns otherwise, with huge pages
    asked for unless the environment says something of them.

    Not where there is a GPU: there the host's memory does not matter."""
    if sys.platform != "linux" or Path("/dev/nvidia0").exists():
        return
    for name, value in huge_pages().items():
        os.environ.setdefault(name, value)
    if "LD_PRELOAD" in os.environ or not sys.orig_argv or (library := find()) is None:
        return
    os.execve(sys.executable, sys.orig_argv, {**environment(*library), **os.environ})


def environment(name: str, path: Path) -> dict[str, str]:
    """What a process runs with the library `name` by."""
    return SETTINGS.get(name, {}) | {"LD_PRELOAD": str(path)}


def huge_pages() -> dict[str, str]:
    """The environment of a process whose tensors are to be on huge pages; empty where the kernel gives none, or gives them unasked."""
    return HUGE_PAGES if _kernel_setting() == "madvise" else {}


def _kernel_setting() -> str:
    """Who gets huge pages: `always`, `madvise`, `never`; `unknown` where the kernel does not say."""
    try:
        return KERNEL_SETTING.read_text().partition("[")[2].partition("]")[0] or "unknown"
    except OSError:
        return "unknown"


def keep_few_kernels() -> None:
    """Hold memory for the shapes of one pack's products (some twenty in a dense model) and not of fifty packs', about 0.5 MB each: a shape comes
    back where a pack of the same length does. Not for experts, whose few tokens make the same shapes again and again. To be called before
    the first product of a process."""
    for name, value in KERNELS.items():
        os.environ.setdefault(name, value)


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


def pages() -> str:
    """What of this process is on huge pages, for a log."""
    asked = all(os.environ.get(name) == value for name, value in HUGE_PAGES.items())
    return {"always": "everything", "madvise": "large tensors" if asked else "none"}.get(_kernel_setting(), "none")


def active() -> str | None:
    """`tcmalloc` or `jemalloc` where this process runs with it."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return next((name for name in LIBRARIES if f"lib{name}" in maps), None)
