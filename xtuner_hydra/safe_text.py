"""Text that may be stored and shown: without the values of secrets (`redact`), and without terminal control characters (`printable`)."""

from __future__ import annotations

import logging
import os
import re
from typing import Any
from unicodedata import category

HIDDEN = "***"
SHORTEST = 8
"""Length from which a secret value is looked for; a shorter one (`true`, `1234`) would black out parts of every text."""

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(_|\d|$)|(^|_)PASS(_|$)|_PWD(_|$)", re.IGNORECASE)
_LOOKS_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{32,}"  # OpenAI, Anthropic
    r"|wandb_v\d_[\w-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|AKIA[A-Z0-9]{16})\b"  # Amazon
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"  # user:password in an address
)
_AFTER_A_NAME = re.compile(r"(api[_-]?key\W{1,5})[0-9a-f]{40}\b", re.IGNORECASE)  # W&B's older keys look like any hash


def is_secret(name: str) -> bool:
    """Whether an environment variable's name means that its value is a secret: `WANDB_API_KEY`, `HF_TOKEN`, `DB_PASSWORD`."""
    return bool(_SECRET_NAME.search(name))


def redact(text: str) -> str:
    """`text` with `***` for the value of every environment variable that `is_secret`, and for what looks like a key of a known service."""
    for value in _secret_values():
        text = text.replace(value, HIDDEN)
    return _AFTER_A_NAME.sub(rf"\1{HIDDEN}", _LOOKS_SECRET.sub(HIDDEN, text))


def redacted(value: Any) -> Any:
    """`redact` of every text in nested dicts (their keys too), lists and tuples."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def printable(text: str) -> str:
    """`text` with control characters except newlines and tabs written out (`\\x1b`): text from strangers must not control the terminal."""
    return "".join(one if one in "\n\t" or category(one) != "Cc" else ascii(one)[1:-1] for one in text)


class LineFormatter(logging.Formatter):
    """Log lines, tracebacks included, without secrets and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(redact(super().format(record)))


def _secret_values() -> list[str]:
    """The longest first, as one may contain another. A value of several lines is looked for line by line, as a diff puts signs before them."""
    values = {line.strip() for name, value in os.environ.items() if is_secret(name) for line in value.splitlines()}
    return sorted((value for value in values if len(value) >= SHORTEST and not _is_path(value)), key=len, reverse=True)


def _is_path(value: str) -> bool:
    """`SSH_KEY_PATH=/home/me/.ssh` says where a secret is, and is not one."""
    return value.startswith("/") and os.path.exists(value)
