"""scripts/compare_loss.py finds what changes the computation, and nothing else."""

import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, Finished

TINY = (
    *("--steps", "3", "model.num_hidden_layers=1", "model.hidden_size=32", "model.intermediate_size=64", "model.vocab_size=2000"),
    *("model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=16", "data.pack_max_length=128", "data.num_workers=0"),
)
FLOAT32, BFLOAT16 = ("parallelism.param_dtype=float32",), ("parallelism.param_dtype=bfloat16",)


@pytest.fixture
def compare(cli):
    def run(*args):
        command = [sys.executable, REPOSITORY / "scripts" / "compare_loss.py", *TINY, *map(str, args)]
        done = subprocess.run(command, cwd=cli.directory, env=cli.environment, capture_output=True, text=True, timeout=180)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def checkout(tmp_path):
    """A tree of its own with the same code, to be changed."""
    for folder in ("xtuner_hydra", "conf", "scripts"):
        shutil.copytree(REPOSITORY / folder, tmp_path / "tree" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "tree"


def edit(file, before, after):
    text = file.read_text()
    assert before in text, "the code has changed; change this test too"
    file.write_text(text.replace(before, after))


def test_bfloat16_is_near_float32(compare):
    done = compare(*BFLOAT16)
    assert done.code == 0, done.text
    assert "neutral: loss is off by" in done.out


def test_the_same_code_gives_the_same_bits(compare, checkout):
    done = compare("--against", checkout, *FLOAT32)
    assert done.code == 0, done.text
    assert "neutral: the same bits in all 3 steps" in done.out
    assert str(checkout) in done.out


def test_sums_in_another_order_are_neutral(compare, checkout):
    edit(checkout / "xtuner_hydra" / "loss.py", "CHUNK = 2**22", "CHUNK = 2**13")
    done = compare("--against", checkout, *FLOAT32)
    assert done.code == 0, done.text
    assert "neutral: loss is off by" in done.out


def test_a_wrong_scale_of_the_gradient_is_found_in_bfloat16_too(compare, checkout):
    """Neither the loss of a step nor, after clipping, its update shows it."""
    edit(checkout / "xtuner_hydra" / "engine.py", "* self.dp_size).backward()", "* self.dp_size * 1.1).backward()")
    done = compare("--against", checkout, *BFLOAT16)
    assert done.code == 1, done.text
    assert "NOT neutral: step 1: grad_norm is off by" in done.out


def test_another_rate_is_found_after_the_first_update(compare):
    done = compare("optimizer.lr=1e-4", "--reference", "optimizer.lr=2e-4", *FLOAT32)
    assert done.code == 1, done.text
    assert "NOT neutral: step 2: loss is off by" in done.out


def test_other_data_is_found(compare):
    done = compare("--reference", "trainer.seed=2", *FLOAT32)
    assert done.code == 1, done.text
    assert "NOT neutral: step 1 has different tokens or labels" in done.out


def test_no_verdict_without_the_other_package(compare, tmp_path):
    done = compare("--against", tmp_path)
    assert done.code == 2, done.text
    assert "there is no xtuner_hydra" in done.err
