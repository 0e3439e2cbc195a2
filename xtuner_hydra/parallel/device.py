"""Facts of a device that metrics need: memory in use, and how fast it multiplies matrices."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path

import torch

# Dense bf16 TFLOP/s from NVIDIA's data sheets, by words of the name that torch reports; the first match counts.
_PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "B200": 2250}
_PEAK_TFLOPS |= {"A100": 312, "A800": 312, "L40S": 362, "L4": 121, "4090": 165}

_LONG = 0.01
"""Seconds of a product that make the cost of starting it negligible."""
_PATIENCE = 0.2
"""Total seconds of the fastest products, after which no larger size is tried."""


def memory_gb(device: torch.device) -> tuple[float, float]:
    """(peak, now) in GB of 2**30 bytes: what torch allocated and reserved on a GPU; resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return max(peak, now) / 2**30, now / 2**30  # the kernel updates the peak only now and then


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that `throughput/mfu` divides by: the data sheet's for a GPU it knows, else the best of a few square products measured here."""
    if device.type == "cuda":
        known = _known_flops(torch.cuda.get_device_name(device))
        if known is not None and dtype == torch.bfloat16:
            return known
    best, size, fastest, spent = 0.0, 128, 0.0, 0.0
    # on a busy CPU small products wait for a descheduled thread; with a dtype that it lacks instructions for, large ones take minutes
    while (size < 1024 or fastest < _LONG) and size < 8192 and spent < _PATIENCE:
        size *= 2
        a = torch.ones(size, size, device=device, dtype=dtype)
        fastest = min(_seconds(a) for _ in range(3))  # the first one warms up, which takes a GPU's library a while
        spent += fastest
        best = max(best, 2 * size**3 / fastest)
    return best


def _seconds(a: torch.Tensor) -> float:
    """Seconds that the product of `a` with itself takes."""
    start = time.perf_counter()
    torch.mm(a, a).flatten()[0].item()
    return time.perf_counter() - start


def _known_flops(name: str) -> float | None:
    """bf16 FLOP/s of a GPU as torch names it: `NVIDIA L4`, `NVIDIA A100-SXM4-80GB`, `NVIDIA GeForce RTX 4090`."""
    words = set(re.split(r"[ -]", name))
    return next((tflops * 1e12 for known, tflops in _PEAK_TFLOPS.items() if words.issuperset(known.split())), None)
