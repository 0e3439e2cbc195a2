"""Chats for tests, as files and as token caches."""

import json

from xtuner_hydra.data.cache import build_cache
from xtuner_hydra.data.tokenizers import ByteTokenizer


def chat(answer, question="q"):
    """One question, one answer, as a line of a file has them."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_lines(path, records):
    """A line a record; a record of bytes is written as it is."""
    lines = [record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def cache_of(directory, records, **options):
    """The token cache of `records` (byte tokenizer, chatml), built in `directory`."""
    path = write_lines(directory / "data.jsonl", records)
    return build([path], directory, **options)


def build(files, directory, *, template="chatml", format="openai", bad_lines="error", num_workers=0):
    return build_cache(
        files,
        format,
        ByteTokenizer(template),
        bad_lines=bad_lines,
        cache_dir=directory / "cache",
        num_workers=num_workers,
        progress=False,
    )
