"""When Python looks for cyclic garbage."""

import gc

from xtuner_hydra.garbage import collect_as_usual, collect_seldom


def test_a_start_lets_garbage_lie_and_training_does_not():
    usual = gc.get_threshold()
    collect_seldom()
    begun = gc.get_threshold()
    collect_as_usual()
    assert begun[0] > 100 * usual[0]
    assert gc.get_threshold() == usual
