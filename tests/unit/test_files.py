"""Files are whole or not there."""

import os
import stat
import threading

import pytest

from xtuner_hydra import files


def test_a_file_is_replaced_whole_and_others_may_read_it(tmp_path):
    path = tmp_path / "status.json"
    files.write_json(path, {"a": "é"})
    files.write_json(path, {"a": "b"})
    assert path.read_text() == '{\n  "a": "b"\n}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~files.umask()
    assert os.listdir(tmp_path) == ["status.json"]


def test_text_that_cannot_be_encoded_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "status.json"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "new" * 10_000 + "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["status.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_a_failure_before_the_end_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, call, error):
    path = tmp_path / "status.json"
    files.write_text(path, "old")

    def fail(*args):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(type(error)):
            files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["status.json"]


def test_a_reader_sees_the_old_content_or_the_new_one(tmp_path):
    path = tmp_path / "metrics"
    files.write_text(path, "a" * 200_000)
    stop, seen = threading.Event(), set()

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        files.write_text(path, "ab"[number % 2] * 200_000)
    stop.set()
    reader.join()
    assert seen <= {"a" * 200_000, "b" * 200_000}


def test_the_whole_tree_is_flushed(tmp_path, monkeypatch):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "deeper" / "file").touch()
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    files.sync_tree(tmp_path)
    assert set(flushed) == {str(path) for path in (tmp_path, *tmp_path.rglob("*"))}
