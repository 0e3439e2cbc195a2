import re

import pytest
from conftest import CommandLine, read_rows


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """(what `plan debug=fast` says, the command line it was said on)"""
    cli = CommandLine(tmp_path_factory.mktemp("plan"))
    done = cli("plan", "debug=fast", "trainer.total_steps=3")
    assert done.code == 0, done.text
    return done.out, cli


def test_a_plan_creates_nothing_but_the_token_cache(fast):
    _, cli = fast
    assert [path.name for path in cli.directory.iterdir()] == [".cache"]


def test_the_run_does_what_the_plan_said(fast):
    out, cli = fast
    assert cli("debug=fast", "trainer.total_steps=3", "tracking=none", "checkpoint=none", "hydra.run.dir=run").code == 0
    rows = [row for row in read_rows(cli.directory / "run") if "train/loss" in row]
    assert re.search(r"^steps +3 ", out, re.MULTILINE)
    assert re.search(r"^tokens +([\d,]+)$", out, re.MULTILINE)[1] == f"{rows[-1]['train/total_tokens']:,}"
    assert f"{rows[0]['train/lr']:.3g} first" in out


def test_disk_is_what_checkpoints_and_exports_take(fast):
    parameters = 2 * 512 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64
    out, _ = fast
    assert f"{parameters / 1e6:.2f} M parameters" in out
    assert "1 checkpoints of" in out
    assert re.search(r"^packs an epoch +\d+, \d+\.\d% full", out, re.MULTILINE)


@pytest.mark.parametrize(("model", "parameters"), [("qwen3_tiny", "227.94 M"), ("qwen3_0p6b", "596.05 M"), ("qwen3_8b", "8190.74 M")])
def test_published_sizes_are_counted_without_building_them(cli, model, parameters):
    done = cli("plan", f"model={model}", "tracking=none", timeout=60)
    assert done.code == 0, done.text
    assert f"{parameters} parameters" in done.out


def test_what_a_run_would_refuse_a_plan_refuses(cli):
    assert cli("plan", "optimizer.lrr=1").code == 2
    assert cli("plan", "-m", "optimizer.lr=1,2").code == 2
