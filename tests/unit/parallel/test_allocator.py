"""A command that trains on a CPU runs under a malloc that keeps its memory, unless its user has decided otherwise."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from xtuner_hydra.parallel import allocator

ASK = "from xtuner_hydra.parallel import allocator; allocator.preload(); import sys; print(allocator.active(), *sys.argv[1:])"
here = pytest.mark.skipif(allocator.find() is None, reason="no tcmalloc or jemalloc on this machine")


def ask(*words, **environment):
    return output(ASK, *words, **environment)


def output(program, *words, **environment):
    set_by_us = {"LD_PRELOAD", *allocator.HUGE_PAGES, *allocator.KERNELS}  # perhaps by another test's engine
    without = {name: value for name, value in os.environ.items() if name not in set_by_us}
    done = subprocess.run([sys.executable, "-c", program, *words], env=without | environment, capture_output=True, text=True, check=True)
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
    monkeypatch.setattr(os, "environ", dict(os.environ))
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
    assert "tcmalloc is on this machine, but LD_PRELOAD= excludes it" in allocator.advice()


TRAIN = """
    from xtuner_hydra.parallel import allocator
    allocator.preload()
    import torch
    weight = torch.ones(2**26)
    on_huge = open("/proc/self/smaps_rollup").read().split("AnonHugePages:")[1].split()[0]
    print(allocator.pages(), int(on_huge) * 1024 > weight.nbytes / 2)
"""


@pytest.mark.skipif(allocator.huge_pages() == {}, reason="this kernel gives no huge pages to who asks")
@pytest.mark.parametrize("environment", [{}, {"LD_PRELOAD": ""}], ids=["with a library", "without"])
def test_large_tensors_are_on_huge_pages_unless_the_user_says_otherwise(environment):
    program = textwrap.dedent(TRAIN)
    assert output(program, **environment) == "large tensors True"
    assert output(program, THP_MEM_ALLOC_ENABLE="0", **environment) == "none False"


@pytest.mark.parametrize(
    ("setting", "asked", "pages"),
    [
        ("always [madvise] never", True, "large tensors"),
        ("[always] madvise never", False, "everything"),
        ("always madvise [never]", False, "none"),
        (None, False, "none"),
    ],
)
def test_the_kernel_is_asked_where_it_listens(setting, asked, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "KERNEL_SETTING", kernel := Path(tmp_path / "enabled"))
    if setting:
        kernel.write_text(setting + "\n")
    assert bool(allocator.huge_pages()) == asked
    monkeypatch.setattr(os, "environ", {**os.environ, **allocator.huge_pages()})
    assert allocator.pages() == pages


PRODUCTS = """
    import os, sys
    from xtuner_hydra.parallel import allocator
    allocator.keep_few_kernels() if sys.argv[1] == "few" else None
    import torch
    weight = torch.randn(64, 512)
    def kilobytes():
        return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
    def product(rows):
        torch.ops.mkldnn._linear_pointwise(torch.randn(rows, 512), weight, None, "none", [], "")
    for rows in range(200, 300):
        product(rows)
    before = kilobytes()
    for rows in range(301, 451):
        product(rows)
    print(kilobytes() - before)
"""


def test_shapes_of_products_that_will_not_come_again_take_no_memory():
    few, all_of_them = (int(output(textwrap.dedent(PRODUCTS), which)) for which in ("few", "all"))
    assert few < all_of_them / 4
