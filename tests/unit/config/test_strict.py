"""Configs back from YAML, and what differs between two."""

import pytest

from xtuner_hydra.config.schema import Config, OptimizerConfig, SweepConfig
from xtuner_hydra.config.strict import changed, from_yaml
from xtuner_hydra.errors import ConfigError, RefusedError


def test_config_error_keeps_its_key():
    error = ConfigError("trainer.seed", None, "why")
    assert (error.key, str(error), error.exit_code) == ("trainer.seed", "trainer.seed=null: why", 2)


def test_changed_tells_default_and_value_of_what_differs():
    config = Config(optimizer=OptimizerConfig(lr=1e-3, betas=[0.9, 0.95]), sweep=SweepConfig(trials=3))
    assert changed(config, Config()) == {"optimizer.lr": (6e-5, 1e-3), "sweep.trials": (20, 3)}
    assert changed(config, config) == {}


def test_a_config_yaml_that_is_a_list_is_refused():
    with pytest.raises(RefusedError, match="holds a list"):
        from_yaml("- a\n- b\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: hello", "data: must be a group of keys"),
        ("data: null", "data: must be a group of keys"),
        ("trainer: {1: 2}", "trainer.1: there is no such key"),
        ("1: 2", "1: there is no such key"),
    ],
)
def test_a_config_yaml_of_another_shape_is_refused(text, words):
    with pytest.raises(RefusedError, match=words):
        from_yaml(text)
