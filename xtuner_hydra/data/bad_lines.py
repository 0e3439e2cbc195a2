"""What can be wrong with a line of data (data.bad_lines says what is done about it)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

LONGEST_MESSAGE = 300
"""Characters of a message; what a line holds may be quoted in it, and be as long as the line."""


class Kind(StrEnum):
    """What is wrong with a line (or a row of Parquet), in the order in which they are checked: the first that applies is reported.

    A line of nothing but white space is neither a record nor bad: it is skipped, but counts as a line."""

    NUL = "NUL bytes"
    """Bytes 0, as a crash or a full disk leaves them in a file; or U+0000 in a text. JSON may write that, but no person does: it is damage
    that some program took for text, and a model would learn to write it."""
    TOO_LARGE = "too large"
    """Longer than sources.LINE_BYTES."""
    UTF8 = "UTF-8"
    """Bytes that are not UTF-8."""
    JSON = "JSON"
    """No JSON, an object with a key twice, or a number that Python does not read (more than 4,300 digits)."""
    NESTING = "nesting"
    """Lists or objects inside each other more deeply than Python follows them, about 1,000 times."""
    EMPTY = "empty"
    """null, {}, [] or ""; a text without a character; a conversation without a message, or in which no message says anything."""
    CONVERSATION = "conversation"
    """JSON that the format refuses: wrong types, unknown roles, a missing field, nothing to learn, text that cannot be written as UTF-8."""


class BadLine(Exception):
    """Why a line cannot be used: its kind, and a sentence without its place."""

    def __init__(self, kind: Kind, message: str) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()  # a role may hold half a surrogate pair
        self.kind = kind
        self.message = message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 4]} ..."
        super().__init__(kind, message)  # by which it is pickled


@dataclass(frozen=True)
class Skipped:
    """A line (or row) that was left out (data.bad_lines=skip). `kind`: a value of Kind."""

    file: str
    line: int
    kind: str
    message: str
