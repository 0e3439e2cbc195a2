"""Chats for tests, as files and as token caches."""

import json

from xtuner_hydra.data.cache import build_cache
from xtuner_hydra.data.formats import parse_openai
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


def content(cache):
    """(ids, supervised) of each sample of a cache."""
    return [(cache.ids(i).tolist(), cache.supervised(i).tolist()) for i in range(len(cache))]


def expected(records):
    """What `content` is to be for `records`."""
    return [tuple(array.tolist() for array in ByteTokenizer().encode(parse_openai(record))) for record in records]
