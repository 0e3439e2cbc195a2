"""Which data files have changed is told without reading those that have not."""

import os

import pytest
from chats import chat, write_lines

from xtuner_hydra.config.schema import SourceConfig
from xtuner_hydra.data import changes
from xtuner_hydra.data.changes import changed_files
from xtuner_hydra.data.prepare import prepare
from xtuner_hydra.data.tokenizers import ByteTokenizer


def test_files_that_change_during_a_run_are_told_apart_from_those_that_were_only_touched(config, tmp_path, monkeypatch):
    prepare(config, ByteTokenizer(), progress=False).save(tmp_path)
    train, held = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    before = train.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(changes, "hash_file", lambda file: pytest.fail("a stat is enough"))
        assert changed_files(tmp_path) == []
        with train.open("ab") as stream:
            stream.write(b"\n")
        assert changed_files(tmp_path) == [f"{train}: changed ({len(before):,} bytes when the run was prepared, {len(before) + 1:,} now)"]
    train.write_bytes(before)
    os.utime(train, ns=(0, 0))
    assert changed_files(tmp_path) == []
    train.write_bytes(before.replace(b"x", b"z"))
    held.unlink()
    assert changed_files(tmp_path) == [f"{train}: changed (other content of the same size)", f"{held}: gone"]


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff", b"[]", b"{}", b'{"train": null, "eval": 3}', b'{"train": {"files": ["a"]}, "eval": null}']
)
def test_changes_are_not_told_where_nothing_is_known(tmp_path, content):
    if content is not None:
        (tmp_path / "data.json").write_bytes(content)
    assert changed_files(tmp_path) == []


def test_changes_of_each_file_of_a_mixture_are_told(config, tmp_path):
    write_lines(tmp_path / "more.jsonl", [chat("z")])
    config.data.path, config.data.sources = None, [SourceConfig(path=str(tmp_path / name)) for name in ("train.jsonl", "more.jsonl")]
    prepare(config, ByteTokenizer(), progress=False).save(tmp_path)
    (tmp_path / "more.jsonl").write_bytes(b"")
    (change,) = changed_files(tmp_path)
    assert change.startswith(f"{tmp_path}/more.jsonl: changed (")
