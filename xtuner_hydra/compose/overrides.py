"""Overrides of a command line, read and checked before Hydra composes: it would advise to force an unknown key in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from xtuner_hydra.config.elsewhere import ours
from xtuner_hydra.config.strict import did_you_mean, known_keys, unknown_key
from xtuner_hydra.errors import RefusedError


def parse_overrides(texts: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Hydra's reading of each override. Raises RefusedError for one that is none."""
    parser, parsed = OverridesParser.create(config_loader=loader), list[Override]()
    for text in texts:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            messages = (str(error), str(error.__cause__))
            why = next((f" ({message.strip().splitlines()[0]})" for message in messages if " at " in message), "")
            raise RefusedError(f"{text}: cannot be read{why}. {_remedy(text, parser)}") from None
        override.config_loader = loader  # where glob(...) looks for options
        parsed.append(override)
    return parsed


def _remedy(text: str, parser: OverridesParser) -> str:
    """How to write an override that cannot be read: in Hydra's grammar `~`, `=` and some other characters need quotes."""
    key, sign, value = text.partition("=")
    quoted = f'{key}="{value}"'
    try:
        parser.parse_override(quoted)
    except HydraException:
        return "Write KEY=VALUE or GROUP=OPTION; quote values with spaces or commas"
    return f"Quote the value, and the quotes for the shell: '{quoted}'" if sign and value else "Write KEY=VALUE or GROUP=OPTION"


def check_overrides(overrides: Sequence[Override], loader: ConfigLoader, groups: Sequence[str], *, multirun: bool) -> None:
    """RefusedError for a key or option that does not exist (with `+` and `++` too), and for several values without `multirun`."""
    # options behind `hydra.searchpath=` are seen by Hydra's own composition only, which refuses unknown ones too
    extra_searchpath = any(override.key_or_group == "hydra.searchpath" for override in overrides)
    for override in overrides:
        key, text = override.key_or_group, override.input_line
        if override.is_delete():
            raise RefusedError(f"{text}: nothing can be removed; set another value, or null where it is allowed")
        if key in groups and override.is_add():
            raise RefusedError(f"{text}: an option is chosen without the +: {str(text).lstrip('+')}")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and override.value() is None:
            raise RefusedError(f"{text}: is empty; name a directory")
        if override.is_sweep_override() and not multirun:
            or_list = "" if key in groups else f", or write {key}=[...] for a list"
            raise RefusedError(f"{text}: several values; add -m to train each of them{or_list}")
        if key in groups:
            if not extra_searchpath:
                _check_option(override, loader.get_group_options(key))
        elif not key.startswith(("hydra.", "hydra/")):
            _check_key(key, str(text), groups)


def option_of(override: Override) -> str:
    """The option that `GROUP=OPTION` names."""
    option = override.value()
    if not isinstance(option, str) or override.package is not None:
        raise RefusedError(f"{override.input_line}: a run is repeated with GROUP=OPTION, an option by its name")
    return option


def _check_key(key: str, text: str, groups: Sequence[str]) -> None:
    if key in known_keys():
        return
    if "." not in key and not ours(key) and (close := did_you_mean(key, [group for group in groups if not group.startswith("hydra")])):
        raise RefusedError(f"{key}: there is no such group or key.{close}")
    raise unknown_key(key, f"the command line: {text}")


def _check_option(override: Override, options: list[str]) -> None:
    group, value = override.key_or_group, override.value()
    choices = getattr(value, "list", []) if override.is_sweep_override() else [value]
    for choice in choices:
        if isinstance(choice, dict):
            raise RefusedError(f"{group}: choose an option ({', '.join(options)}), and set single values with {group}.KEY=VALUE")
        if choice is None:  # Hydra takes null from a file only
            raise RefusedError(f"{group}=null: not from a command line; leave it out. Options of {group}: {', '.join(options)}")
        name = str(getattr(choice, "text", choice))
        if name not in options:
            listed = ", ".join(options) or "none"
            hint = _own(group, name) or did_you_mean(name, options)
            raise RefusedError(f"{group}={name}: there is no such option.{hint} Options of {group}: {listed}")


def _own(group: str, name: str) -> str:
    """What to write where `name` is not an option but a model or data of one's own."""
    if group == "model" and ("/" in name or Path(name).is_dir()):
        return f" Of your own, or from the Hub: model=hf model.pretrained={name}."
    if group == "data" and ("/" in name or Path(name).exists()):
        return f" Of your own: data=openai data.path={name} (or another format than openai)."
    return ""
