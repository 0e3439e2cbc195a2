"""What the machine and the launcher report: cores, kernel files, this process's rank."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float:
    """Main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def started_by_torchrun() -> bool:
    """True if an elastic launcher (torchrun, or ours) has given this process a rank."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def own_rank() -> int:
    """This process's rank among all; 0 without a launcher."""
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def lines(path: str) -> list[str]:
    """Lines of a kernel file, none if the system has no such file."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
