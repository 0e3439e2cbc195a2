"""`model.pretrained` as a directory here: a path as it is, a Hub id from the Hugging Face cache or the network."""

from __future__ import annotations

import re
from pathlib import Path

from xtuner_hydra.errors import ConfigError

_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# no pickles, no code; the rest are tokenizer files
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def local_directory(pretrained: str, *, config_only: bool = False, revision: str | None = None) -> Path:
    """The directory of `pretrained`. A Hub id (ORG/NAME) is downloaded (its newest `revision` if none is named), with `config_only`
    only its config.json; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as in huggingface_hub. Raises ConfigError if it is not available."""
    path = Path(pretrained).expanduser()
    if path.exists() or not _ID.fullmatch(pretrained):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=["config.json"] if config_only else _WANTED))
    except LocalEntryNotFoundError:
        why = "it is neither a directory here nor in the Hugging Face cache, and the Hub cannot be reached; check the path, or connect"
    except HFValidationError as error:
        why = f"it is neither a directory here nor a Hub id ({error})"
    except HfHubHTTPError as error:
        why = f"there is no such directory here, and the Hub refuses ({_first_line(error)}); check the name, and HF_TOKEN if it is gated"
    except OSError as error:
        why = f"there is no such directory here, and it cannot be downloaded ({_first_line(error)})"
    raise ConfigError("model.pretrained", pretrained, why)


def published_name(directory: str) -> tuple[str, str | None]:
    """(Hub id, revision) of a directory in the Hugging Face cache, so that others can find it too; (the directory, None) of any other."""
    path = Path(directory)
    kind, *parts = path.parent.parent.name.split("--")
    if path.parent.name == "snapshots" and kind == "models" and len(parts) == 2:
        return "/".join(parts), path.name
    return directory, None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
