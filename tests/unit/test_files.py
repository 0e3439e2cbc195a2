import os
import stat

import pytest

from xtuner_hydra import files


def test_a_file_is_replaced_whole_and_others_may_read_it(tmp_path):
    path = tmp_path / "status.json"
    files.write_json(path, {"a": "é"})
    files.write_json(path, {"a": "b"})
    assert path.read_text() == '{\n  "a": "b"\n}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~files.umask()
    assert os.listdir(tmp_path) == ["status.json"]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    files.write_text(path, "old")

    def fail(handle):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["status.json"]
