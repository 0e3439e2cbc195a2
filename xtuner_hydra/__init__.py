"""xtuner_hydra: say what to train as a handful of YAML groups; get a run you can trust, compare and repeat."""

__version__ = "0.1.0"
