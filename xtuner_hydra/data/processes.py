"""`map` by several processes, in order. One that dies is noticed at once, whatever it was doing: its end of a pipe of its own closes.

(concurrent.futures waits for ever for a process that died in the middle of sending its result, and for one that is stopped even after Ctrl-C.)"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_DIED = "died (out of memory?)"
_START_AHEAD = 2  # items a process that may be begun before the result of the oldest is taken


class ProcessDied(Exception):
    """A process died, or could not be started; the message is that, without a subject."""


def map_in_processes(function: Callable[[Item], Result], items: Iterator[Item], count: int) -> Iterator[Result]:
    """`map(function, items)` by `count` processes, to which function, items and results are pickled. Raises what `function` raises, and ProcessDied.

    However it ends, no process is left: what still runs is killed. One whose parent is killed ends after the item it is at.
    One that hangs, as under SIGSTOP, is waited for, until Ctrl-C."""
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads and locks in whatever state they are
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            processes[ours] = process = context.Process(target=_serve, args=(theirs,), daemon=True)
            try:
                process.start()
            except OSError as error:
                raise ProcessDied(f"cannot be started ({error.strerror or error})") from None
            theirs.close()  # the process has its own copy, and with the last one the pipe ends
        yield from _in_order(function, items, list(processes))
    finally:
        for connection, process in processes.items():
            connection.close()
            if process.pid is not None:
                process.kill()
                process.join()


def _in_order(function: Callable[[Item], Result], items: Iterator[Item], connections: list[Connection]) -> Iterator[Result]:
    busy: dict[Connection, int] = {}  # number of the item that each is at
    starting, idle = set(connections), list[Connection]()
    results: dict[int, Result] = {}
    begun = given = 0
    end = object()
    while True:
        while idle and begun < given + _START_AHEAD * len(connections) and (item := next(items, end)) is not end:
            connection = idle.pop()
            _send(connection, item)
            busy[connection], begun = begun, begun + 1
        if given in results:
            yield results.pop(given)
            given += 1
        elif not busy and idle:
            return
        else:
            for ready in wait([*busy, *starting]):
                assert isinstance(ready, Connection)
                result = _receive(ready)
                if ready in starting:
                    starting.remove(ready)
                    _send(ready, function)
                else:
                    results[busy.pop(ready)] = result
                idle.append(ready)


def _send(connection: Connection, value: object) -> None:
    try:
        connection.send(value)
    except OSError:
        raise ProcessDied(_DIED) from None


def _receive(connection: Connection) -> Any:
    try:
        result, error = connection.recv()
    except (EOFError, OSError):
        raise ProcessDied(_DIED) from None
    if error is not None:
        raise error
    return result


def _serve(connection: Connection) -> None:
    """What a process does: say that it is there, take the function, then items one after the other until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough; each would start a thread a core of its own
    try:
        connection.send((None, None))
        function = connection.recv()
        while True:
            connection.send(_result(function, connection.recv()))
    except (EOFError, OSError):
        return


def _result(function: Callable[[Any], Any], item: Any) -> tuple[Any, Exception | None]:
    try:
        return function(item), None
    except Exception as error:
        return None, error
