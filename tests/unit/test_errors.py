"""Errors keep their message on the way from another process."""

import pickle
from pathlib import Path

import pytest

from xtuner_hydra.errors import ConfigError, DataError, SaveError, Stopped


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("trainer.seed", None, "why"),
        DataError("a.jsonl line 3: not JSON"),
        SaveError(Path("step-3"), 1, "No space left on device"),
        Stopped("stopped by a signal", 75),
    ],
)
def test_an_error_survives_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)
