"""A GPU's speed is looked up by its whole name, a CPU's is measured."""

import pytest
import torch

from xtuner_hydra.parallel import device
from xtuner_hydra.parallel.device import _known_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40", None),  # not an L4
        ("NVIDIA RTX A1000", None),
    ],
)
def test_only_the_gpus_that_are_known(name, tflops):
    assert _known_flops(name) == (tflops and tflops * 1e12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_between_the_slowest_and_the_fastest_there_are(dtype):
    assert 1e8 < peak_flops(torch.device("cpu"), dtype) < 1e15


def test_a_first_product_that_takes_long_to_begin_does_not_end_the_measuring(monkeypatch):
    """As on a GPU, whose library is loaded by it."""
    sizes = []

    def seconds(a):
        sizes.append(len(a))
        return 5.0 if len(sizes) == 1 else 2 * len(a) ** 3 / 1e12

    monkeypatch.setattr(device, "_seconds", seconds)
    assert device.peak_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(1e12)
    assert max(sizes) == 2048  # the first that takes long enough
