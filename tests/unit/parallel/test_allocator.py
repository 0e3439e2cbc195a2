"""A command that trains on a CPU runs under a malloc that keeps its memory, unless its user has decided otherwise."""

import os
import subprocess
import sys

import pytest

from xtuner_hydra.parallel import allocator

ASK = "from xtuner_hydra.parallel import allocator; allocator.preload(); import sys; print(allocator.active(), *sys.argv[1:])"
here = pytest.mark.skipif(allocator.find() is None, reason="no tcmalloc or jemalloc on this machine")


def ask(*words, **environment):
    without = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-c", ASK, *words], env=without | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@here
def test_a_process_replaces_itself_by_the_same_command_under_the_library():
    name, _ = allocator.find()
    assert ask("a b", "c") == f"{name} a b c"


@pytest.mark.parametrize("preload", ["", "/nowhere/libown.so"])
def test_what_the_user_preloads_is_left_alone_and_an_empty_value_switches_it_off(preload):
    assert ask("x", LD_PRELOAD=preload) == "None x"


def test_without_a_library_the_command_goes_on_as_it_is(monkeypatch):
    monkeypatch.setattr(allocator, "LIBRARIES", {})
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("replaced itself by nothing better"))
    allocator.preload()


def test_the_best_library_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtcmalloc_minimal.so.4").touch()
    (tmp_path / "lib" / "libjemalloc.so.2").touch()
    assert allocator.find() == ("tcmalloc", tmp_path / "lib" / "libtcmalloc_minimal.so.4")


def test_advice_is_how_to_get_one_or_who_leaves_it_out(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setattr(allocator, "find", lambda: None)
    assert "apt install" in allocator.advice()
    monkeypatch.setattr(allocator, "find", lambda: ("tcmalloc", tmp_path))
    assert "apt install" not in allocator.advice()
    assert "tcmalloc is on this machine, but LD_PRELOAD= leaves it out" in allocator.advice()
