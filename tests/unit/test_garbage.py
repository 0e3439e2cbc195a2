"""When Python looks for cyclic garbage: the command line lets it lie until it trains."""

import gc
import subprocess
import sys

USUAL = gc.get_threshold()
COMMAND = """
import gc
from xtuner_hydra import __main__, app, trainer

compose = app.App.compose
app.App.compose = lambda self, overrides: print("composing", gc.get_threshold()[0]) or compose(self, overrides)
trainer.Trainer.fit = lambda self: print("training", gc.get_threshold()[0])
__main__.command()
"""


def test_a_start_lets_garbage_lie_and_training_does_not(cli):
    command = [sys.executable, "-c", COMMAND, "debug=fast", "tracking=none", "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=cli.directory, env=cli.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("composing", "training")))
    assert int(told["composing"]) > 100 * USUAL[0]
    assert int(told["training"]) == USUAL[0]
