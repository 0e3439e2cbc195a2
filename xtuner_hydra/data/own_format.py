"""A format of the user's own: data.format=package.module:function, found and imported, and what it makes checked."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from xtuner_hydra.data.formats import PARSERS, Conversation, Format, Sample, Text, as_text, parse_openai, parse_text, refuse_silence
from xtuner_hydra.errors import ConfigError


def find_format(name: str, key: str = "data.format") -> Format:
    """The function behind data.format: one of ours, or `package.module:function`, which is imported (from the working directory too).

    A function of yours takes a decoded record and returns what the `openai` format takes (a list of messages, or an object with `messages`),
    text for a document, or a Conversation or Text (data/formats.py); it raises ValueError for a record that cannot be used. Naming one runs
    its code: it is one of the few places where a config can. Raises ConfigError that names `key` where it cannot be
    imported."""
    if name in PARSERS:
        return PARSERS[name]
    function = _import(name, key)
    return lambda record: _made_by(name, function, record)


def format_identity(name: str, key: str = "data.format") -> str:
    """What decides what a format reads, for the cache's key: its name, and for a function of the user's the content of the file that it is named
    by and of those that this one uses, as far as they lie beside or below it. Raises ConfigError as find_format does."""
    if name in PARSERS:
        return name
    _import(name, key)
    digest = hashlib.sha256()
    for source in _sources(sys.modules[name.partition(":")[0]]):
        digest.update(source.read_bytes())
    return f"{name} {digest.hexdigest()}"


def _sources(module: ModuleType) -> list[Path]:
    """The module's file and those of the modules whose values it has, or whose values they have, in the tree that it was imported from. Of installed
    packages only its own is looked at: the others are the environment's."""
    if module.__file__ is None:
        return []
    root = Path(module.__file__).parents[module.__name__.count(".") + hasattr(module, "__path__")]
    found, pending = {Path(module.__file__)}, [module]
    while pending:
        for value in list(vars(pending.pop()).values()):
            used = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", None)))
            file = Path(getattr(used, "__file__", None) or "")
            if used is None or file in found or not file.is_relative_to(root) or _is_others(used, file, module):
                continue
            found.add(file)
            pending.append(used)
    return sorted(found)


def _is_others(used: ModuleType, file: Path, by: ModuleType) -> bool:
    package, own, ours = (name.partition(".")[0] for name in (used.__name__, by.__name__, __name__))
    return package == ours or (package != own and not {"site-packages", "dist-packages"}.isdisjoint(file.parts))


def _import(name: str, key: str) -> Callable[[object], object]:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the installed command does not have it, `python -m` has
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise ConfigError(
            key, name, f"cannot be imported ({type(error).__name__}: {error}); give package.module:function, found from {os.getcwd()}"
        ) from None
    if not callable(found):
        raise ConfigError(key, name, "is not a function")
    return found


def _made_by(name: str, function: Callable[[object], object], record: object) -> Sample:
    try:
        made = function(record)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} failed ({type(error).__name__}: {error})") from None
    if isinstance(made, Conversation):
        refuse_silence(made.messages)
        return made
    if isinstance(made, Text):
        return as_text(made.pieces)
    return parse_text(made) if isinstance(made, str) else parse_openai(made)
