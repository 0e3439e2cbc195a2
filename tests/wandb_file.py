"""W&B's offline file: a 7-byte head, then LevelDB's log format (blocks of 32 KiB, pieces of crc, length, type), each record a protobuf."""

import json
import struct
from types import SimpleNamespace

_BLOCK = 1 << 15
_FULL, _LAST = 1, 4


def payloads(content):
    """The serialized records in order."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:  # too little for a piece: zeros fill the block
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (_FULL, _LAST):
            yield record
            record = b""


def read(run_dir):
    """What a run directory's offline run holds, where there is one."""
    (found,) = read_all(run_dir)
    return found


def read_all(run_dir):
    """A record for every start of the run, the first one first (a resumed run writes a file a start)."""
    return [read_file(path) for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def read_file(path):
    """`history` rows, `metrics` defined, `artifacts` and system `stats`, the last `summary` and `config`, and the last record of every other kind."""
    from wandb.proto import wandb_internal_pb2

    found = SimpleNamespace(history=[], metrics=[], artifacts=[], stats=[], summary={}, config={}, exit=None)
    for data in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "metric":
            found.metrics.append(record.metric)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "stats":
            found.stats.append(_values(record.stats.item))
        elif kind == "summary":
            found.summary |= _values(record.summary.update)
        elif kind == "config":
            found.config |= _values(record.config.update)
        else:
            setattr(found, kind, getattr(record, kind))
    found.config |= _values(found.run.config.update)
    return found


def _values(items):
    """Values by key. Stats have no nested keys."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
