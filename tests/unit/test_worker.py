"""What a worker does at a run's end."""

import logging
import os

import pytest
from runs import evaluation, make_run, step

from xtuner_hydra import worker
from xtuner_hydra.config.schema import Config, DataConfig, ModelConfig, MoEConfig
from xtuner_hydra.parallel import allocator


def test_a_run_ends_with_its_reports(tmp_path):
    make_run(tmp_path, [step(1, 3.0), step(2, 2.0), evaluation(2, 1.5)])
    worker._report(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "Completed after 2 steps" in (tmp_path / "report.html").read_text()


def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(directory):
        raise ValueError("no such font")

    make_run(tmp_path, [step(1, 3.0)])
    monkeypatch.setattr(worker, "loss_png", fail)
    logging.getLogger("xtuner_hydra").propagate = True  # a run in this process would have turned it off
    with caplog.at_level(logging.WARNING, "xtuner_hydra"):
        worker._report(tmp_path)
    assert [record.message for record in caplog.records] == ["fail failed, the run is not affected: ValueError: no such font"]
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(("moe", "kernels"), [(None, allocator.KERNELS), (MoEConfig(6, 2, 20), {})], ids=["dense", "experts"])
def test_a_dense_model_is_built_with_few_kernels_kept(moe, kernels, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name not in allocator.KERNELS}
    monkeypatch.setattr(os, "environ", environment)

    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "blueprint", stop)
    config = Config(model=ModelConfig("qwen3", 97, 40, 72, 3, 6, 2, 10, moe=moe), data=DataConfig(path="unused"))
    with pytest.raises(KeyboardInterrupt):
        worker.build_engine(config, place=None)
    assert {name: environment[name] for name in allocator.KERNELS if name in environment} == kernels
