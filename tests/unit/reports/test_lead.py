"""When a lead is more than chance."""

import math

import numpy as np
import pytest

from xtuner_hydra.reports.lead import enough


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 15, 30, 200])
def test_the_table_is_students(freedom):
    """Against the density, integrated: 97.5 % lie below."""
    x = np.linspace(0, enough(freedom), 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    below = 0.5 + np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert below == pytest.approx(0.975, abs=0.0004)
