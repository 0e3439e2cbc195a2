"""Hydra's and OmegaConf's errors in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import yaml
from hydra.conf import HydraConf
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from xtuner_hydra.config.strict import did_you_mean, known_keys, unknown_key
from xtuner_hydra.errors import RefusedError


@contextmanager
def readable_errors() -> Iterator[None]:
    """Hydra's and OmegaConf's complaints as one sentence each."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
            raise RefusedError(f"{mark.name}:{mark.line + 1}: not YAML: {error.problem}") from None
        # Hydra's advice would be to force the key in
        if (key := re.match(r"Could not override '([\w.]+)'", str(error))) and key[1] in known_keys():
            unknown, parent = str(getattr(error.__cause__, "full_key", key[1])), key[1].rpartition(".")[0]
            if unknown not in known_keys():
                raise unknown_key(unknown, "the command line") from None
            raise RefusedError(
                f"{key[1]}: there is no {parent} here to set a part of; set it whole: '{parent}={{KEY:VALUE,...}}'"
            ) from None
        if key and key[1].startswith("hydra."):
            raise RefusedError(f"{key[1]}: there is no such key.{did_you_mean(key[1], list(known_keys(HydraConf, 'hydra.')))}") from None
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip() and not _is_advice(line)]
        culprit = getattr(error.__cause__, "full_key", None)  # for a value that does not fit, Hydra's own words tell the override only
        raise RefusedError(f"{culprit or 'config'}: {' '.join(lines[:2])}") from None


def _is_advice(line: str) -> bool:
    """Hydra advises to force an unknown key in with a `+`, which we would refuse, and lists where it looked."""
    return line.strip().startswith(("To append to your config", "Config search path:", "provider="))
