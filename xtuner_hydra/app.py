"""The Hydra app: command-line arguments -> composed, strictly checked configs; the sweep. With sweeps/ the only code that imports Hydra.

`@hydra.main` makes the run directory before anyone can refuse it and turns a typo into advice to force it in, so its parts are called here
in our order: parse, check the overrides against the schema, compose, check strictly; only then does anything happen."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xtuner_hydra.config.names import job_name, run_name
from xtuner_hydra.config.schema import Config
from xtuner_hydra.config.strict import did_you_mean, known_keys, to_config, unknown_key
from xtuner_hydra.errors import ConfigError, RefusedError

PACKAGE = Path(__file__).parent
CHECKOUT_CONF = PACKAGE.parent / "conf"


@dataclass(frozen=True)
class Composition:
    """What a command line composes to: the typed config, where the run goes, and how it came about."""

    config: Config
    run_dir: Path
    overrides: list[str]
    choices: dict[str, str | None]


class App:
    """Hydra, set up for one command line. Use as a context manager: Hydra keeps global state."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.args = self._parse_args(argv)
        self.overrides: list[str] = self.args.overrides
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
        self.hydra = Hydra.create_main_hydra2("xtuner_hydra", search_path)
        return self

    def __exit__(self, *exc: object) -> None:
        GlobalHydra.instance().clear()

    @property
    def config_name(self) -> str:
        return self.args.config_name or "config"

    @property
    def is_sweep(self) -> bool:
        return bool(self.args.multirun)

    def shows_something(self) -> bool:
        """True for --help, --cfg, --info, --hydra-help and --shell-completion, after printing; a config that is shown is checked first."""
        with _readable_errors():
            if self.args.help:
                self.hydra.app_help(self.config_name, get_args_parser(), self.args)
            elif self.args.hydra_help:
                self.hydra.hydra_help(self.config_name, get_args_parser(), self.args)
            elif self.args.shell_completion:
                self.hydra.shell_completion(self.config_name, self.overrides)
            elif self.args.cfg or self.args.info:
                self.compose(self.overrides)
                if self.args.cfg:
                    self.hydra.show_cfg(self.config_name, self.overrides, self.args.cfg, self.args.package, self.args.resolve)
                else:
                    self.hydra.show_info(self.args.info, self.config_name, self.overrides)
            else:
                return False
        return True

    def compose(self, overrides: list[str]) -> Composition:
        """Compose and check one run; raises RefusedError or ConfigError with the culprit's full key."""
        parsed = self._check_overrides(overrides)
        with _readable_errors():
            cfg = self.hydra.compose_config(self.config_name, list(overrides), run_mode=RunMode.RUN, with_log_configuration=False)
        HydraConfig.instance().set_config(cfg)  # so that ${hydra:...} resolves
        return self._typed(cfg, [override.input_line or "" for override in parsed])

    def jobs(self) -> list[list[str]]:
        """The override lists of a sweep's jobs: Hydra's grid over every value with commas, `choice(...)`, `range(...)`."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parsed = self._check_overrides(self.overrides)
        with _readable_errors():
            task = [override for override in parsed if not override.key_or_group.startswith("hydra.")]
            (jobs,) = BasicSweeper.split_arguments(task, None)
        return jobs

    def hydra_overrides(self) -> list[str]:
        """The overrides that speak to Hydra (`hydra.sweep.dir=...`), not to the job."""
        return [override for override in self.overrides if override.lstrip("+").startswith(("hydra.", "hydra/"))]

    def sweep_dir(self) -> Path:
        """The sweep's directory."""
        with _readable_errors():
            cfg = self.hydra.compose_config(self.config_name, list(self.overrides), run_mode=RunMode.MULTIRUN, with_log_configuration=False)
            HydraConfig.instance().set_config(cfg)
            return Path(str(cfg.hydra.sweep.dir)).resolve()

    def multirun(self, task: Callable[[Composition], object], sweep_dir: Path) -> None:
        """Hand the sweep to Hydra's sweeper and launcher, which call `task` for each job with that job's composition."""

        def run(cfg: DictConfig) -> object:
            hydra_cfg = HydraConfig.get()
            overrides = [str(override) for override in hydra_cfg.overrides.task]
            return task(self._typed(cfg, overrides, run_dir=Path(hydra_cfg.runtime.output_dir)))

        overrides = [*self.overrides, f"hydra.sweep.dir='{sweep_dir}'", "hydra.mode=MULTIRUN"]
        with _readable_errors():
            self.hydra.multirun(self.config_name, run, overrides, with_log_configuration=False)

    def _typed(self, cfg: DictConfig, overrides: list[str], run_dir: Path | None = None) -> Composition:
        """`cfg` with its place in the file system; `run_dir`: None takes hydra.run.dir."""
        hydra = HydraConfig.get()
        choices = {str(key): value for key, value in hydra.runtime.choices.items() if not str(key).startswith("hydra/")}
        job = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        fill_from_pretrained(job)
        with _readable_errors():
            where = functools.partial(self._where_set, overrides, choices)
            config = to_config(job, where)
            run_dir = run_dir or Path(str(hydra.run.dir)).resolve()
        return Composition(config, run_dir, [override for override in overrides if not override.startswith("hydra")], choices)

    def _check_overrides(self, overrides: list[str]) -> list[Override]:
        """Parse `overrides` and refuse, before Hydra composes, a key or option that does not exist (with `+` and `++` too)."""
        try:
            parsed = OverridesParser.create(config_loader=self.hydra.config_loader).parse_overrides(overrides)
        except HydraException as error:
            raise RefusedError(
                str(error).strip().splitlines()[0] + "  Write KEY=VALUE or GROUP=OPTION; quote values with spaces or commas"
            ) from None
        groups, keys = self.hydra.list_all_config_groups(), known_keys()
        # options behind `hydra.searchpath=` are seen by Hydra's own composition only, which refuses unknown ones too
        extra_searchpath = any(override.key_or_group == "hydra.searchpath" for override in parsed)
        for override in parsed:
            key = override.key_or_group
            if override.is_delete():
                raise RefusedError(f"{override.input_line}: nothing can be removed; set another value, or null where it is allowed")
            if override.is_sweep_override() and not self.is_sweep:
                raise RefusedError(f"{override.input_line}: several values; add -m to train each of them, or write {key}=[...] for a list")
            if key.startswith(("hydra.", "hydra/")) or (key in groups and "." not in key):
                if key in groups and not extra_searchpath:
                    self._check_option(override)
            elif key not in keys:
                if "." not in key and (close := did_you_mean(key, [group for group in groups if not group.startswith("hydra")])):
                    raise RefusedError(f"{key}: there is no such group or key.{close}")
                raise unknown_key(key, f"the command line: {override.input_line}")
        return parsed

    def _check_option(self, override: Override) -> None:
        group = override.key_or_group
        options = self.hydra.config_loader.get_group_options(group)
        value = override.value()
        values = [value] if not override.is_sweep_override() else [item for item in getattr(value, "list", [])]
        for choice in values:
            if isinstance(choice, dict):
                raise RefusedError(f"{group}: choose an option ({', '.join(options)}), and set single values with {group}.KEY=VALUE")
            name = str(getattr(choice, "text", choice))
            if choice is None and group in ("experiment", "debug"):
                continue
            if name not in options:
                raise RefusedError(
                    f"{group}={'null' if choice is None else name}: there is no such option.{did_you_mean(name, options)}"
                    f" Options of {group}: {', '.join(options) or 'none'}"
                )

    def _where_set(self, overrides: list[str], choices: dict[str, str | None], key: str) -> str:
        """The override or the file that gave `key` its value (the last one wins)."""
        for override in reversed(overrides):
            name = override.lstrip("+").partition("=")[0]
            if name == key or (key.startswith((f"{name}.", f"{name}[")) and "." in name):
                return f"the command line: {override}"
        group, _, rest = key.partition(".")
        for owner, inner in (("debug", key), ("experiment", key), (group, rest)):
            option = choices.get(owner)
            if option and self._file_has(owner, option, inner):
                return f"{owner}/{option}.yaml"
        return f"{group}/{choices.get(group)}.yaml"

    def _file_has(self, group: str, option: str, key: str) -> bool:
        file = self.hydra.config_loader.repository.load_config(f"{group}/{option}")  # type: ignore[attr-defined]
        return file is not None and OmegaConf.select(file.config, key, throw_on_missing=False) is not None

    @staticmethod
    def _parse_args(argv: Sequence[str]) -> argparse.Namespace:
        parser = get_args_parser()
        parser.prog = "python -m xtuner_hydra"
        return parser.parse_intermixed_args(list(argv))  # exits with 2, our code for a refusal too


def fill_from_pretrained(cfg: DictConfig) -> None:
    """`model=hf`: fill what the config leaves open (???) from pretrained/config.json; what was set by hand stays."""
    model = cfg.get("model")
    if not isinstance(model, DictConfig) or model.get("family") != "hf":
        return
    if not model.get("pretrained"):
        raise ConfigError("model.pretrained", None, "model=hf needs model.pretrained=DIR, a Hugging Face model directory")
    from xtuner_hydra.model.families import read_hf_config

    OmegaConf.set_struct(model, False)
    for key, value in read_hf_config(Path(str(model.pretrained))).items():
        if key == "family" or OmegaConf.is_missing(model, key):
            model[key] = value


def _conf_dir() -> str:
    """conf/ of a checkout (or an editable install), else the copy inside the installed package."""
    return str(CHECKOUT_CONF) if (CHECKOUT_CONF / "config.yaml").is_file() else "pkg://xtuner_hydra.conf"


@functools.cache
def _register_resolvers() -> None:
    """The resolvers that conf/ uses; idempotent."""
    OmegaConf.register_new_resolver("example", lambda name: str(PACKAGE / "examples" / name))
    OmegaConf.register_new_resolver("run_name", lambda choices, overrides: run_name(choices, overrides))
    OmegaConf.register_new_resolver("job_name", lambda number, overrides: job_name(number, overrides))
    # Hydra's own `now` repeats within a second only for one job; ours adds microseconds, so that runs started together differ
    OmegaConf.register_new_resolver("now", lambda pattern: datetime.now().strftime(pattern), use_cache=True, replace=True)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Hydra's and OmegaConf's complaints as one sentence each."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        raise RefusedError("config: " + " ".join(lines[:2])) from None
