"""What the app hands to the launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xtuner_hydra.config.schema import Config


@dataclass(frozen=True)
class Composition:
    """What a command line composes to: the typed config, where the run goes, and how it came about.

    defaults(): the config of a command line without overrides. rerun_of: the run directory that this repeats."""

    config: Config
    run_dir: Path
    overrides: list[str]
    choices: dict[str, str | None]
    defaults: Callable[[], Config]
    rerun_of: Path | None = None
