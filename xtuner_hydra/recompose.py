"""A run's config with further overrides, for `rerun`: what app.py composes from conf/, but onto an already resolved config."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from xtuner_hydra.app import App, directory
from xtuner_hydra.compose.overrides import option_of
from xtuner_hydra.compose.pretrained import fill_from_pretrained
from xtuner_hydra.compose.readable_errors import readable_errors
from xtuner_hydra.config.composition import Composition
from xtuner_hydra.config.names import split_override
from xtuner_hydra.config.schema import Config
from xtuner_hydra.config.strict import to_config


def recompose(app: App, config: Config, typed: list[str], name: str, rerun_of: Path) -> Composition:
    """The run `name` again: its resolved `config` with the command line's overrides, checked as in `App.compose`.

    GROUP=OPTION replaces the whole group by that option, and sets whatever else the option's file sets. `typed`: the run's own overrides."""
    parsed = app.check_overrides(app.overrides)
    groups = [override for override in parsed if override.key_or_group in app.groups and not override.key_or_group.startswith("hydra/")]
    given = {override.key_or_group: option_of(override) for override in groups}
    # options that an option's file chooses, as an experiment may; those of the command line win
    chosen = {key: value for group, option in given.items() for key, value in app.chosen_by(group, option).items()} | given
    task = [override for override in app.overrides if override not in app.hydra_overrides()]
    composed = app.compose_options(chosen, task, name)
    cfg = OmegaConf.create(asdict(config))
    for group in reversed(list(composed.hydra.runtime.choices)):  # Hydra notes them last one first; a later one's values win
        if group in chosen:
            _replace_group(app, cfg, group, chosen[group])
    for override in parsed:
        if override not in groups and not override.key_or_group.startswith(("hydra.", "hydra/")):
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    fill_from_pretrained(cfg)
    with readable_errors():
        where = functools.partial(app.where_set, task, dict(chosen))
        again = to_config(cfg, where)
        app.refuse_unsafe(again, where)
        run_dir = directory("hydra.run.dir", composed.hydra.run.dir)
    return Composition(again, run_dir, _joined(typed, task), dict(chosen), lambda: app.defaults, rerun_of)


def _replace_group(app: App, cfg: DictConfig, group: str, option: str) -> None:
    with readable_errors():
        # an option that chooses options of other groups does not compose alone; those are replaced separately
        alone = app.file(f"{group}/{option}") if app.chosen_by(group, option) else app.composed([], name=f"{group}/{option}")
    assert alone is not None
    if group in cfg:
        cfg[group] = asdict(Config())[group]
    cfg.merge_with(OmegaConf.masked_copy(alone, [str(key) for key in alone if key != "hydra"]))


def _joined(before: list[str], after: Sequence[str]) -> list[str]:
    """Overrides in `before` that `after` leaves in force, then `after`."""
    replaced = {key for key, _ in map(split_override, after)}
    keys = {override: split_override(override)[0] for override in before}
    kept = [override for override, key in keys.items() if not {key, key.partition(".")[0]} & replaced]
    return [*kept, *after]
