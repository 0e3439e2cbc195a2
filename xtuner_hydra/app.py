"""The Hydra app: command-line arguments -> composed, strictly checked configs; the sweep. With sweeps/ the only code that imports Hydra.

`@hydra.main` makes the run directory before anyone can refuse it and turns a typo into advice to force it in, so its parts are called here
in our order: parse, check the overrides against the schema, compose, check strictly; only then does anything happen."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.resolvers import oc

from xtuner_hydra.compose.overrides import check_overrides, parse_overrides
from xtuner_hydra.compose.pretrained import fill_from_pretrained
from xtuner_hydra.compose.readable_errors import readable_errors
from xtuner_hydra.config.composition import Composition
from xtuner_hydra.config.names import is_plain, job_name, run_name, split_override
from xtuner_hydra.config.schema import Config, SweepConfig
from xtuner_hydra.config.strict import did_you_mean, flatten, known_keys, targets, to_config, to_group, unknown_key
from xtuner_hydra.errors import ConfigError, RefusedError
from xtuner_hydra.safe_text import is_secret, redact, redacted

PACKAGE = Path(__file__).parent
CHECKOUT_CONF = PACKAGE.parent / "conf"
_PLUGINS = ("hydra.launcher._target_", "hydra.sweeper._target_")  # Hydra takes installed plug-ins alone
_SAMPLERS = "optuna.samplers."  # parts of the sweeper plug-in for Optuna
DURATIONS = ("trainer.total_steps", "trainer.epochs", "trainer.total_tokens")


class _Hydra(Hydra):
    """Hydra, whose search for groups copies all configuration sources for every group, as a search path may be added; here none is."""

    def list_all_config_groups(self, parent: str = "") -> list[str]:
        """Full names of the groups that have options, each before those in it."""
        repository, groups = self.config_loader.repository, list[str]()  # type: ignore[attr-defined]
        for name in repository.get_group_options(parent, ObjectType.GROUP):
            group = f"{parent}/{name}" if parent else name
            if repository.get_group_options(group, ObjectType.CONFIG):
                groups.append(group)
            groups += self.list_all_config_groups(group)
        return groups


class App:
    """Hydra, set up for one command line. Use as a context manager: Hydra keeps global state."""

    def __init__(self, argv: Sequence[str], typed: Sequence[str] | None = None) -> None:
        """typed: the words that the user has typed in this very command, where `argv` are others, which a directory has recorded."""
        self.args = self._parse_args(argv)
        self.overrides: list[str] = self.args.overrides
        self.typed = self.overrides if typed is None else typed
        _register_resolvers()

    def __enter__(self) -> App:
        setbase("1.3")
        GlobalHydra.instance().clear()
        search_path = create_config_search_path(self.args.config_path or _conf_dir())
        if self.args.config_dir is not None:
            if not Path(self.args.config_dir).is_dir():
                raise RefusedError(f"--config-dir {self.args.config_dir}: no such directory")
            # behind our own files and before the schema, which Hydra wants last: Hydra's own --config-dir does the same
            search_path.prepend("command-line", f"file://{Path(self.args.config_dir).resolve()}", SearchPathQuery(provider="schema"))
        self.hydra = _Hydra.create_main_hydra2("xtuner_hydra", search_path)
        return self

    def __exit__(self, *exc: object) -> None:
        GlobalHydra.instance().clear()

    @property
    def config_name(self) -> str:
        return self.args.config_name or "config"

    @functools.cached_property
    def is_sweep(self) -> bool:
        """With -m, and where a preset says what to sweep or a sweep is to be resumed."""
        if self.args.multirun:
            return True
        if any(key in ("sweep", "sweep.resume") for key, _ in map(split_override, self.overrides)):
            sweep = self._multirun_config.sweep
            self.args.multirun = bool(sweep.params or sweep.resume)
        return bool(self.args.multirun)

    def shows_something(self) -> bool:
        """True for --help, --cfg, --info, --hydra-help and --shell-completion, after printing; a config that is shown is checked first."""
        with readable_errors():
            if self.args.help:
                self.hydra.app_help(self.config_name, get_args_parser(), self.args)
            elif self.args.hydra_help:
                self.hydra.hydra_help(self.config_name, get_args_parser(), self.args)
            elif self.args.shell_completion:
                self.hydra.shell_completion(self.config_name, self.overrides)
            elif self.args.cfg or self.args.info:
                self.compose(self.overrides)
                self._refuse_unknown_package()
                if self.args.cfg:
                    self.hydra.show_cfg(self.config_name, self.overrides, self.args.cfg, self.args.package, self.args.resolve)
                else:
                    self.hydra.show_info(self.args.info, self.config_name, self.overrides)
            else:
                return False
        return True

    def _refuse_unknown_package(self) -> None:
        name = self.args.package
        if name not in (None, "_global_") and OmegaConf.select(self.composed(self.overrides), name) is None:
            raise RefusedError(f"--package {name}: there is no such group or key.{did_you_mean(name, list(known_keys()))}")

    def compose_run(self) -> Composition:
        """Compose and check the one run of this command line; refuses settings of a sweep, which it would not use."""
        if idle := self._first_of("sweep", "hydra.sweep.", "hydra.sweeper", "hydra.launcher", "hydra/sweeper", "hydra/launcher"):
            raise RefusedError(f"{idle}: is a setting of a sweep, but this is a single run; add -m")
        return self.compose(self.overrides)

    def _first_of(self, *beginnings: str) -> str | None:
        """The first override whose key begins like that."""
        return next((text for text in self.overrides if split_override(text)[0].startswith(beginnings)), None)

    def compose(self, overrides: list[str]) -> Composition:
        """Compose and check one run; raises RefusedError or ConfigError with the culprit's full key."""
        parsed = self.check_overrides(overrides)
        with readable_errors():
            cfg = self.composed(overrides)
        HydraConfig.instance().set_config(cfg)  # so that ${hydra:...} resolves
        return self._typed(cfg, [override.input_line or "" for override in parsed])

    def compose_job(self, overrides: list[str], swept: list[str], number: int, sweep_dir: Path) -> Composition:
        """Compose and check a sweep's job: its `overrides`, of which `swept` set it apart, and a directory named by hydra.sweep.subdir."""
        parsed = self.check_overrides([*overrides, *swept])
        with readable_errors():
            texts = [*overrides, *swept, *self.hydra_overrides()]
            cfg = self.composed(texts)
            with read_write(cfg), open_dict(cfg):
                cfg.hydra.job.num = number
                cfg.hydra.overrides.task = swept
            HydraConfig.instance().set_config(cfg)
            directory = sweep_dir / _plain("hydra.sweep.subdir", cfg.hydra.sweep.subdir)
        return self._typed(cfg, [override.input_line or "" for override in parsed], directory)

    def compose_options(self, chosen: dict[str, str], task: list[str], name: str) -> DictConfig:
        """The composition of the `chosen` options alone, whose run directory is called after the run `name` and the overrides `task`."""
        groups = [f"{group}={option}" for group, option in chosen.items()]
        with readable_errors():
            cfg = self.composed([*groups, *self.hydra_overrides()])
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.runtime.choices.rerun = name
            cfg.hydra.overrides.task = task
        HydraConfig.instance().set_config(cfg)
        return cfg

    def hydra_overrides(self) -> list[str]:
        """The overrides that speak to Hydra (`hydra.sweep.dir=...`), not to the job."""
        return [override for override in self.overrides if split_override(override)[0].startswith(("hydra.", "hydra/"))]

    def sweep_dir(self) -> Path:
        """The sweep's directory."""
        with readable_errors():
            return directory("hydra.sweep.dir", self._multirun_config.hydra.sweep.dir)

    def sweep_config(self) -> SweepConfig:
        """The `sweep` group, checked; what is swept itself has no say in it. Refuses a directory for a single run, which would not be used."""
        if idle := self._first_of("hydra.run."):
            raise RefusedError(f"{idle}: is for a single run; the directory of a sweep is hydra.sweep.dir")
        return to_group("sweep", SweepConfig, self._multirun_config.sweep)

    def sweep_preset(self) -> dict[str, str]:
        """What the chosen option of `sweep` sets outside its own group and nothing sets otherwise, by full key, as an override would say it.

        Its duration gives way to one that was chosen."""
        file = self.file(f"sweep/{self._multirun_config.hydra.runtime.choices['sweep']}")
        values = OmegaConf.to_container(file) if file is not None and "sweep" in file else {}
        assert isinstance(values, dict)
        others = flatten({str(key): value for key, value in values.items() if key != "sweep"})
        cfg = self._multirun_config
        in_force = {key: value for key, value in others.items() if OmegaConf.select(cfg, key) == value}
        if any(OmegaConf.select(cfg, key) is not None and key not in in_force for key in DURATIONS):
            in_force = {key: value for key, value in in_force.items() if key not in DURATIONS}
        return {key: json.dumps(value) for key, value in in_force.items()}

    def launcher(self) -> tuple[str, dict[str, Any]]:
        """(the option of hydra/launcher, its values)."""
        hydra = self._multirun_config.hydra
        with readable_errors():
            options = OmegaConf.to_container(hydra.launcher, resolve=True)
        assert isinstance(options, dict)
        return str(hydra.runtime.choices["hydra/launcher"]), {str(key): value for key, value in options.items()}

    @property
    def sweeper(self) -> str:
        """The option of hydra/sweeper: `basic`, or a plug-in's."""
        return str(self._multirun_config.hydra.runtime.choices["hydra/sweeper"])

    def multirun(self, task: Callable[..., object]) -> None:
        """Let Hydra's sweeper plug-in choose jobs, which its launcher hands to `task`."""
        overrides = [*self.overrides, "hydra.mode=MULTIRUN"]
        with readable_errors():
            self.hydra.multirun(self.config_name, task, overrides, with_log_configuration=False)

    @property
    def launches_elsewhere(self) -> bool:
        """Whether a sweep's jobs run on other machines."""
        return self.launcher()[1].get("cluster", "local") != "local"

    @functools.cached_property
    def _multirun_config(self) -> DictConfig:
        with readable_errors():
            self.check_overrides(self.overrides)
            cfg = self.composed(self.overrides, RunMode.MULTIRUN)
        HydraConfig.instance().set_config(cfg)
        return cfg

    @functools.cached_property
    def defaults(self) -> Config:
        """The config of a command line without overrides; where one's own --config-name leaves values open, the schema's defaults."""
        with readable_errors():
            cfg = self.composed([])
        HydraConfig.instance().set_config(cfg)
        try:
            return self._typed(cfg, []).config
        except RefusedError:
            return Config()

    def composed(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN, *, name: str | None = None) -> DictConfig:
        """Hydra's composition of the file `name` (None: the main one). Raises RefusedError where a file names code to run."""
        name = name or self.config_name
        main = self.hydra.config_loader.repository.load_config(name)  # type: ignore[attr-defined]
        for path in (OmegaConf.select(main.config, "hydra.searchpath") or []) if main else []:
            if str(path).startswith("pkg://"):  # Hydra would import the package
                raise RefusedError(
                    f"hydra.searchpath: {path} (set in {name}.yaml) runs a package's code; say hydra.searchpath=[{path}] yourself"
                )
        cfg = self.hydra.compose_config(name, list(overrides), run_mode=mode, with_log_configuration=False)
        for key in targets(OmegaConf.to_container(cfg.hydra, resolve=False), "hydra"):  # of the others `to_config` says where they were set
            if key not in _PLUGINS and not str(OmegaConf.select(cfg, key)).startswith(_SAMPLERS):
                raise unknown_key(key)
        return cfg

    def refuse_unsafe(self, config: Config, where: Callable[[str], str]) -> None:
        """RefusedError for a value that holds a secret, and for code of others that nobody has asked for in this command."""
        for key, value in flatten(asdict(config)).items():
            if redacted(value) != value:
                raise RefusedError(
                    f"{key}: holds a secret (of an environment variable, or what looks like a key), and a run writes its config down; "
                    f"leave it in the environment (set in {redact(where(key))})"
                )
        sources = enumerate(config.data.sources or [])
        formats = {"data.format": config.data.format, **{f"data.sources[{number}].format": one.format for number, one in sources}}
        for key, name in formats.items():
            if name is not None and ":" in name and not self.may_run(name):
                raise RefusedError(
                    f"{key}={name}: runs the function {name}, which a file names and not this command (set in {where(key)}); "
                    "read it, then add --trust"
                )

    def may_run(self, name: str) -> bool:
        """Whether the user has typed `name`, the name of some code, in this very command, or said --trust."""
        whole = re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.])")  # `theirs.fmt:parse` does not permit fmt:parse
        return self.args.trust or any(whole.search(word) for word in self.typed)

    def _typed(self, cfg: DictConfig, overrides: list[str], run_dir: Path | None = None) -> Composition:
        """`cfg` with its place in the file system; `run_dir`: None takes hydra.run.dir."""
        hydra = HydraConfig.get()
        choices = {str(key): value for key, value in hydra.runtime.choices.items() if not str(key).startswith("hydra/")}
        job = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        fill_from_pretrained(job)
        with readable_errors():
            where = functools.partial(self.where_set, overrides, choices)
            config = to_config(job, where)
            self.refuse_unsafe(config, where)
            _plain("hydra.job.name", hydra.job.name)
            run_dir = run_dir or directory("hydra.run.dir", hydra.run.dir)
        return Composition(
            config,
            run_dir,
            [override for override in overrides if not split_override(override)[0].startswith("hydra")],
            choices,
            lambda: self.defaults,
        )

    def check_overrides(self, texts: list[str]) -> list[Override]:
        """`texts` as Hydra reads them. Raises RefusedError, before anything is composed, for what does not exist."""
        loader = self.hydra.config_loader
        parsed = parse_overrides(texts, loader)
        check_overrides(parsed, loader, self.groups, multirun=self.args.multirun)
        return parsed

    @functools.cached_property
    def groups(self) -> list[str]:
        """All config groups, Hydra's own too."""
        return list(self.hydra.list_all_config_groups())

    def chosen_by(self, group: str, option: str) -> dict[str, str]:
        """Options of other groups that GROUP/OPTION.yaml chooses (`defaults: - override /model: hf`)."""
        loaded = self.hydra.config_loader.repository.load_config(f"{group}/{option}")  # type: ignore[attr-defined]
        defaults = [one for one in (loaded.defaults_list if loaded else None) or [] if isinstance(one, GroupDefault) and one.override]
        return {str(one.group).lstrip("/"): str(one.value) for one in defaults}

    def where_set(self, overrides: list[str], choices: dict[str, str | None], key: str) -> str:
        """The override or the file that gave `key` its value (the last one wins)."""
        for override in reversed(overrides):
            name, _ = split_override(override)
            if name == key or (key.startswith((f"{name}.", f"{name}[")) and "." in name):
                return f"the command line: {override}"
        group, _, rest = key.partition(".")
        presets = [(f"{owner}/{choices[owner]}", key) for owner in ("debug", "experiment") if choices.get(owner)]
        own = [(f"{group}/{choices[group]}", rest)] if choices.get(group) else []
        for name, inner in (*presets, (self.config_name, key), *own):
            file = self.file(name)
            if file is not None and OmegaConf.select(file, inner, throw_on_missing=False) is not None:
                return f"{name}.yaml"
        return f"{own[0][0] if own else self.config_name}.yaml"

    def file(self, name: str) -> DictConfig | None:
        """The content of NAME.yaml, where NAME is GROUP/OPTION or that of a main file; None where there is no such file."""
        loaded = self.hydra.config_loader.repository.load_config(name)  # type: ignore[attr-defined]
        return None if loaded is None else loaded.config

    @staticmethod
    def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
        parser = get_args_parser()
        parser.prog = "python -m xtuner_hydra"
        parser.add_argument(
            "--trust", action="store_true", help="Run code that a config or a run names (data.format=package.module:function)"
        )
        parser.error = _refuse_option  # type: ignore[method-assign]
        return parser.parse_intermixed_args(list(argv))


def _refuse_option(message: str) -> NoReturn:
    """What argparse calls where it would print its usage."""
    raise RefusedError(f"{message}. Settings are written KEY=VALUE, without --: optimizer.lr=1e-4. Options: --help")


def directory(key: str, value: Any) -> Path:
    """`value` as the absolute path that it must be; an unset variable of a shell would make it empty, which means here."""
    if not str(value or "").strip():
        raise ConfigError(key, value, "is empty; name a directory")
    return Path(str(value)).expanduser().resolve()


def _conf_dir() -> str:
    """conf/ of a checkout (or an editable install), else the copy inside the installed package."""
    return str(CHECKOUT_CONF) if (CHECKOUT_CONF / "config.yaml").is_file() else "pkg://xtuner_hydra.conf"


def _plain(key: str, value: Any) -> str:
    """`value` as the name that it must be."""
    if not is_plain(str(value)):
        raise ConfigError(key, value, "is a path; give a name")
    return str(value)


def _env(name: str, *default: Any) -> str | None:
    """OmegaConf's `oc.env`, but a secret stays in the environment: what a config holds is written to disk, logged and tracked."""
    if is_secret(name):
        raise ValueError(f"${{oc.env:{name}}} would write a secret into the config; leave it in the environment, where it is found")
    return oc.env(name, *default)


@functools.cache
def _register_resolvers() -> None:
    """The resolvers that conf/ uses; idempotent."""
    OmegaConf.register_new_resolver("example", lambda name: str(PACKAGE / "examples" / name))
    OmegaConf.register_new_resolver("run_name", lambda choices, overrides: run_name(choices, overrides))
    OmegaConf.register_new_resolver("job_name", lambda number, overrides: job_name(number, overrides))
    OmegaConf.register_new_resolver("oc.env", _env, replace=True)
    # Hydra's own `now` repeats within a second only for one job; ours adds microseconds, so that runs started together differ
    OmegaConf.register_new_resolver("now", lambda pattern: datetime.now().strftime(pattern), use_cache=True, replace=True)
