import pytest
from runs import finished, make_sweep

from xtuner_hydra.reports.drawing import MetricScale
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.results.sweep import read_sweep


def test_far_off_values_do_not_squeeze_the_others(tmp_path):
    jobs = [({"optimizer.lr": 1e-4 * n}, finished(loss)) for n, loss in enumerate([1.0, 1.1, 1.2, 500.0], 1)]
    found = Findings(read_sweep(make_sweep(tmp_path, jobs)))
    metric = MetricScale.of(found)
    assert metric.high < 2
    assert [round(metric.goodness(setting), 1) for setting in found.settings] == pytest.approx([1.0, 0.8, 0.7, 0.0], abs=0.11)
