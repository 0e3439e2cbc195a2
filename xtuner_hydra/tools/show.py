"""Printing what a person asked for."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """Print `text`; a reader that has seen enough of it (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains once more as it ends
