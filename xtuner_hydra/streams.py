"""Standard streams that neither a lost terminal, a full disk nor a narrow encoding turns into an error of what is printed."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


def make_lasting() -> None:
    """Make stdout and stderr of this process last (`_Lasting`). Characters that their encoding lacks are written as escapes, as a log may hold
    any language."""
    sys.stdout, sys.stderr = (_lasting(stream) for stream in (sys.stdout, sys.stderr))


def open_closed() -> None:
    """Where one was closed (`<&-`, some daemons), the next file or pipe would take its number, and what is written to it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


class _Lasting(io.FileIO):
    """A file whose writes fail only where its reader has gone on purpose (`| head`). Where it cannot be written (its terminal is gone, the disk is
    full), a word on stderr says so once, and what is written is dropped: a run has its log file."""

    lost = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write, or drop, all of `data`; its number of bytes."""
        if self.lost:
            return len(data)
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.lost = True
            with suppress(OSError):
                os.write(2, f"xtuner_hydra: output cannot be written ({error.strerror}); nothing more is printed there\n".encode())
            return len(data)


def _lasting(stream: TextIO | None) -> TextIO | None:
    """A stream of the same kind on the same file; None for one that was closed before Python started."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw: Any = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
