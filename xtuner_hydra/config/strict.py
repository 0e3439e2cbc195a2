"""Strictness: an override or a file that names a key nobody knows, or a value of the wrong type, is refused with one sentence.

Hydra's own struct mode lets `+optimizer.lrr=1` and lost group files through, so a composed config passes a second time through the
dataclasses of schema.py. Nothing here imports Hydra."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from xtuner_hydra.config.elsewhere import ours
from xtuner_hydra.config.schema import Config, SourceConfig
from xtuner_hydra.errors import ConfigError, RefusedError

T = TypeVar("T")

TARGET = "_target_"
"""The key by which Hydra names a class or function to call."""
_SUSPECT = re.compile(r"[!&*]|\$\{")  # what a text has that needs a closer look
_SCANNER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def known_keys(schema: type = Config, prefix: str = "") -> dict[str, bool]:
    """Every dotted key of the schema; True where the key is a group of keys."""
    keys: dict[str, bool] = {}
    hints = get_type_hints(schema)
    for field in fields(schema):
        key, kind = prefix + field.name, hints[field.name]
        group = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)  # `MoEConfig | None` is one too
        keys[key] = group is not None
        if group is not None:
            keys |= known_keys(group, key + ".")  # type: ignore[arg-type]
    return keys


def is_whole(key: str) -> bool:
    """Whether the key's values are whole numbers and no others."""
    kinds = _kinds_of(key, Config)
    return int in kinds and float not in kinds


def _kinds_of(key: str, schema: type | None) -> list[type]:
    """The types that the value of a dotted key of `schema` may have; none for a key that it does not have."""
    *groups, name = key.split(".")
    for group in groups:
        schema = schema and next(filter(is_dataclass, _kinds(get_type_hints(schema).get(group))), None)
    return _kinds(get_type_hints(schema).get(name)) if schema else []


def did_you_mean(word: str, candidates: list[str]) -> str:
    """` Did you mean X?` for the nearest candidates by spelling (whole keys, then their last part), or an empty string."""
    by_tail = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
    close = difflib.get_close_matches(word, candidates, n=3, cutoff=0.85)
    close += [by_tail[tail] for tail in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(by_tail), n=3, cutoff=0.7)]
    close = list(dict.fromkeys(close))[:3]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def unknown_key(key: str, where: str = "") -> RefusedError:
    """The error for a key that the schema does not have."""
    if key.rpartition(".")[2] == TARGET:
        return RefusedError(f"{key}: names code to call{f' (set in {where})' if where else ''}; a config holds values only")
    parent, keys = key.rpartition(".")[0], known_keys()
    if key.partition(".")[0] in ("debug", "experiment"):
        return RefusedError(f"{key}: such a file sets keys of all groups; begin it with the line `# @package _global_`")
    hint = ours(key) or did_you_mean(key, [known for known, is_group in keys.items() if not is_group])
    if not hint and keys.get(parent):
        siblings = [known for known in keys if known.rpartition(".")[0] == parent]
        hint = f" {parent} has {', '.join(known.rpartition('.')[2] for known in siblings)}."
    return RefusedError(
        f"{key}: there is no such key{f' (set in {where})' if where else ''}.{hint} All keys: python -m xtuner_hydra --cfg job"
    )


def to_config(cfg: DictConfig, where: Callable[[str], str]) -> Config:
    """The typed, checked Config of a composed `cfg`. `where(key)` says which file or override set a key, for the message.

    Raises RefusedError (unknown key, wrong type, missing value, bad interpolation) or ConfigError (a value out of range)."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        for key in targets(plain):
            raise unknown_key(key, where(key))
        assert isinstance(plain, dict)
        _refuse_misplaced(plain, Config, "", where)
        _refuse_bad_sources(plain.get("data", {}), where)
        _make_whole(plain, Config)
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        _refuse_missing(merged, where)
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise unknown_key(str(error.full_key), where(str(error.full_key))) from None
    except ValidationError as error:
        raise RefusedError(f"{error.full_key}: {_wrong_type(error, Config)} (set in {where(str(error.full_key))})") from None
    except ConfigError as error:
        raise RefusedError(f"{error} (set in {where(error.key)})") from None
    except MissingMandatoryValue as error:
        raise RefusedError(f"{error.full_key}: needs a value; set {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        set_in = f" (set in {where(error.full_key)})" if error.full_key else ""
        raise RefusedError(f"{error.full_key or 'config'}: {_first_line(error)}{set_in}") from None
    assert isinstance(config, Config)
    return config


def to_group(name: str, schema: type[T], cfg: DictConfig) -> T:
    """The typed, checked dataclass of one group of a composed config. Raises RefusedError."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg, resolve=True))
        group = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise unknown_key(f"{name}.{error.full_key}") from None
    except ValidationError as error:
        raise RefusedError(f"{name}.{error.full_key}: {_wrong_type(error, schema)}") from None
    except OmegaConfBaseException as error:
        raise RefusedError(f"{name}.{error.full_key}: {_first_line(error)}") from None
    assert isinstance(group, schema)
    return group


def from_yaml(text: str) -> Config:
    """The Config of a run's config.yaml, which is plain data: a run directory may be a stranger's.

    Raises RefusedError, for tags, anchors and interpolations too, or yaml.YAMLError for text that is not YAML."""
    refuse_non_data(text)
    cfg = OmegaConf.create(text)
    if not isinstance(cfg, DictConfig):
        raise RefusedError("config.yaml: holds a list, not groups of keys")
    return to_config(cfg, lambda key: "config.yaml")


def targets(nested: Any, prefix: str = "") -> Iterator[str]:
    """The full key of every `_target_` in nested dicts and lists."""
    if isinstance(nested, dict):
        for key, value in nested.items():
            full = f"{prefix}.{key}" if prefix else str(key)
            if key == TARGET:
                yield full
            yield from targets(value, full)
    elif isinstance(nested, list):
        for number, value in enumerate(nested):
            yield from targets(value, f"{prefix}[{number}]")


def to_yaml(config: Config) -> str:
    """`config` as YAML, in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed(config: Config, default: Config) -> dict[str, tuple[Any, Any]]:
    """{full key: (default, value)} of every value in which `config` differs from `default`, in the order of the schema."""
    ours, theirs = flatten(asdict(config)), flatten(asdict(default))
    keys = dict.fromkeys([*ours, *theirs])
    return {key: (theirs.get(key), ours.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}; lists and empty dicts are values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def refuse_non_data(text: str) -> None:
    """RefusedError for a config.yaml that no run has written: a run's values are resolved and plain, so a tag, an anchor (of which a few lines
    can make gigabytes) or `${...}` is damage or an attack."""
    if not _SUSPECT.search(text):
        return
    for token in yaml.scan(text, Loader=_SCANNER):
        where = f"config.yaml line {token.start_mark.line + 1}"
        if isinstance(token, yaml.TagToken):
            raise RefusedError(f"{where}: the YAML tag {''.join(map(str, filter(None, token.value)))} has no place in a run's config")
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            raise RefusedError(f"{where}: the YAML anchor {token.value} has no place in a run's config")
        if isinstance(token, yaml.ScalarToken) and "${" in token.value:
            raise RefusedError(f"{where}: {token.value[:80]!r} is an interpolation; a run's config is resolved, so this one was changed")


def _refuse_bad_sources(data: dict[str, Any], where: Callable[[str], str]) -> None:
    """Refuse, by its full key, what an item of data.sources must not have; OmegaConf would name the last part alone."""
    sources = data.get("sources")
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        prefix = f"data.sources[{i}]"
        set_in, names = where(prefix), [field.name for field in fields(SourceConfig)]
        if not isinstance(source, dict):
            raise RefusedError(f"{prefix}: must be {{{', '.join(names)}}}, got {source!r} (set in {set_in})")
        try:
            OmegaConf.merge(OmegaConf.structured(SourceConfig), source)
        except ConfigKeyError as error:
            hint = did_you_mean(str(error.key), names)
            raise RefusedError(
                f"{prefix}.{error.key}: there is no such key (set in {set_in}).{hint} A source has {', '.join(names)}"
            ) from None
        except ValidationError as error:
            raise RefusedError(f"{prefix}.{error.full_key}: {_wrong_type(error, SourceConfig)} (set in {set_in})") from None


def _refuse_misplaced(values: Any, schema: type, prefix: str, where: Callable[[str], str]) -> None:
    """Refuse, by its full key, a value where a group of keys belongs, a group where a value does, and a list or its absence; OmegaConf
    does not always tell the key."""
    hints = get_type_hints(schema)
    for name, value in values.items():
        if not isinstance(name, str):
            raise unknown_key(f"{prefix}{name}", where(f"{prefix}{name}"))
        key, kinds = f"{prefix}{name}", _kinds(hints.get(name))
        group = next(filter(is_dataclass, kinds), None)
        if not kinds or Any in kinds or value == "???":
            continue  # unknown keys and missing values are refused elsewhere
        if group is not None and isinstance(value, dict):
            _refuse_misplaced(value, group, f"{key}.", where)
        elif group is not None and not (value is None and type(None) in kinds):
            names = ", ".join(field.name for field in fields(group))
            raise RefusedError(f"{key}: must be a group of keys ({names}), got {value!r} (set in {where(key)})")
        elif isinstance(value, dict) and dict not in kinds:
            raise RefusedError(f"{key}: must be {' or '.join(map(_spoken, kinds))}, got the group {value!r} (set in {where(key)})")
        elif list in kinds and not isinstance(value, list) and type(value) not in kinds:
            raise RefusedError(f"{key}: must be a list, got {value!r} (set in {where(key)})")


def _make_whole(values: dict[Any, Any], schema: type) -> None:
    """Turn a float without a fraction, `1e6`, into a whole number, in place, where the schema wants one."""
    for name, value in values.items():
        kinds = _kinds_of(name, schema)
        group = next(filter(is_dataclass, kinds), None)
        if isinstance(value, dict) and group is not None:
            _make_whole(value, group)
        elif isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
            values[name] = int(value)


def _kinds(hint: Any) -> list[type]:
    """The types that a hint allows: of `list[int] | None`, list and NoneType."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    return [get_origin(part) or part for part in parts if part is not None]


def _spoken(kind: type) -> str:
    return {type(None): "null", str: "a string", list: "a list", bool: "true or false", int: "a whole number", float: "a number"}[kind]


def _wrong_type(error: ValidationError, schema: type) -> str:
    """What the value should have been and is; of a list's item, OmegaConf's words."""
    kinds = _kinds_of(str(error.full_key), schema)
    if not kinds:
        return _first_line(error)
    return f"must be {' or '.join(map(_spoken, kinds))}, got {'null' if error.value is None else repr(error.value)}"


def _refuse_missing(merged: Any, where: Callable[[str], str]) -> None:
    """`???` left in a group is refused by name; `model=hf` has had its open shapes filled in by then."""
    if merged.data.get("sources") and OmegaConf.is_missing(merged.data, "path"):
        merged.data.path = None  # a mixture stands in for it
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise RefusedError(f"{missing[0]}: needs a value; set {missing[0]}=... (left open in {where(missing[0])})")


def _first_line(error: Exception) -> str:
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).strip().splitlines()[0]).strip('"')
