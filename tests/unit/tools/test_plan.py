"""plan says what the run will then do, and does none of it."""

import os
import re

import pytest
from conftest import CommandLine, read_rows

from xtuner_hydra.__main__ import main


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


@pytest.mark.parametrize(
    "name", ["steps", "tokens", "packs an epoch", "learning rate", "memory", "disk", "model", "ranks", "run directory"]
)
def test_a_plan_says_what_one_would_ask(fast, name):
    out, _ = fast
    assert re.search(rf"^{name} +\S", out, re.MULTILINE)


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """`plan` inside this process: (exit code, what it prints)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))

    def run(*arguments):
        code = main(["plan", "tracking=none", *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_the_packs_that_are_planned_are_the_packs_that_are_trained(say):
    """An epoch of them holds all tokens: full packs x their number x their length."""
    _, text = say("debug=fast", "trainer.total_steps=null", "trainer.epochs=1")
    packs, percent = re.search(r"^packs an epoch +(\d+), (\d+\.\d)% full$", text, re.MULTILINE).groups()
    tokens = re.search(r"^tokens +([\d,]+)$", text, re.MULTILINE)[1].replace(",", "")
    assert f"steps           {packs} " in text
    assert int(tokens) / (int(packs) * 256) == pytest.approx(float(percent) / 100, abs=0.006)


def decoder_parameters(vocab, hidden, inner, layers, heads, kv_heads, head_dim, tied):
    """Qwen3's parameters, from the shapes in its paper: q, k, v, o; gate, up, down; two norms, and one each for queries and keys."""
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * inner + 2 * hidden + 2 * head_dim
    return vocab * hidden * (1 if tied else 2) + layers * layer + hidden


SHAPES = {  # vocab, hidden, inner, layers, heads, key-value heads, head_dim, tied
    "debug=fast": (512, 64, 128, 2, 4, 2, 16, False),
    "model=qwen3_tiny": (151936, 512, 12288, 3, 32, 8, 128, False),
    "model=qwen3_0p6b": (151936, 1024, 3072, 28, 16, 8, 128, True),
    "model=qwen3_8b": (151936, 4096, 12288, 36, 32, 8, 128, False),
}


def test_parameters_by_hand_are_the_published_ones():
    assert decoder_parameters(*SHAPES["model=qwen3_tiny"]) == pytest.approx(227.94e6, abs=5e3)  # of XTuner's verification model
    # bytes of bf16 weights in Qwen/Qwen3-8B's index; parameters in Qwen/Qwen3-0.6B's file, which holds the tied embedding twice
    assert 2 * decoder_parameters(*SHAPES["model=qwen3_8b"]) == 16_381_470_720
    assert decoder_parameters(*SHAPES["model=qwen3_0p6b"]) + 151936 * 1024 == 751_632_384


@pytest.mark.parametrize("model", SHAPES)
def test_a_plan_counts_the_parameters(say, model):
    code, text = say(model)
    assert (code, f"{decoder_parameters(*SHAPES[model]) / 1e6:.2f} M parameters" in text) == (0, True), text


def test_a_large_model_is_not_built_for_it(cli):
    """8.19 B parameters would take 31 GB; the process stays below 2."""
    process = cli.start_fresh("plan", "model=qwen3_8b", "tracking=none")
    _, status, used = os.wait4(process.pid, 0)
    out = (cli.directory / "output").read_text()
    assert (status, "8190.74 M parameters" in out) == (0, True), out
    assert used.ru_maxrss < 2 * 2**20  # KiB
    assert used.ru_utime + used.ru_stime < 30


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [(["adamw"], 2), (["sgd"], 1), (["sgd", "optimizer.momentum=0"], 0), (["muon"], 1 + 2 * 151936 * 4096 / 8190735360)],
)
def test_disk_and_memory_follow_from_the_parameters(say, optimizer, moments):
    """fp32 weights and the optimizer's moments (Muon's one, but AdamW's two of embedding and head) a checkpoint, fp32 weights an export; in training
    a gradient too."""
    _, text = say("model=qwen3_8b", "trainer.total_steps=30", "checkpoint.interval=10", f"optimizer={optimizer[0]}", *optimizer[1:])
    weights = 4 * decoder_parameters(*SHAPES["model=qwen3_8b"]) / 2**30
    disk, memory = ([float(number) for number in gigabytes(text, name)] for name in ("disk", "memory"))
    one = (1 + moments) * weights
    assert disk == pytest.approx([2 * one + weights, one, weights], rel=0.01)
    assert memory == pytest.approx([one + weights], rel=0.01)
    assert "2 checkpoints" in text


def gigabytes(text, name):
    """The numbers of GB on the line that `name` begins."""
    return re.findall(r"(\S+) GB", re.search(rf"^{name} .*$", text, re.MULTILINE)[0])


def test_copies_of_the_weights_do_not_share_the_memory(say):
    ranks = ["debug=fast", "parallelism.nproc_per_node=4", "trainer.global_batch_size=4"]
    one, shared, copies = (
        float(gigabytes(say(*words)[1], "memory")[0]) for words in (["debug=fast"], ranks, [*ranks, "parallelism.dp_replicate=4"])
    )
    assert (shared, copies) == (pytest.approx(one / 4, rel=0.01), one)


@pytest.mark.parametrize("keep", [1, 50])
def test_sizes_are_written_out(say, keep):
    """Not as 4.6e+03."""
    _, text = say("model=qwen3_8b", "trainer.total_steps=1000", "checkpoint.interval=10", f"checkpoint.keep={keep}")
    assert all(re.fullmatch(r"\d+(\.\d+)?", number) for number in gigabytes(text, "disk"))


def test_as_many_checkpoints_are_announced_as_stay(fast):
    """Of steps 2, 4, 6, 7: the newest, and the fourth for good."""
    _, cli = fast
    job = ("debug=fast", "trainer.total_steps=7", "tracking=none", "checkpoint.interval=2", "checkpoint.keep=1", "checkpoint.keep_every=4")
    told = re.search(r"^disk .*\((\d+) checkpoints of", cli("plan", *job).out, re.MULTILINE)[1]
    assert cli(*job, "hydra.run.dir=kept").code == 0
    assert int(told) == len(list((cli.directory / "kept" / "checkpoints").iterdir())) == 2
    best = cli("plan", *job, "checkpoint.keep_best=eval/loss", "trainer.eval_interval=2").out
    assert "(3 checkpoints of" in best


def test_nothing_saved_takes_no_disk(say):
    _, text = say("debug=fast", "checkpoint=none")
    assert re.search(r"^disk .*0 checkpoints .* 0 exports", text, re.MULTILINE)


def test_a_bad_config_exits_with_2(cli):
    done = cli("plan", "optimizer.lrr=1")
    assert (done.code, "Did you mean optimizer.lr?" in done.err, "Traceback" in done.err) == (2, True, False), done.text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["-m"], "nothing to sweep"),
        (["sweep.trials=3"], "sweep.trials=3: is a setting of a sweep, but this is a single run; add -m"),
        (["data.path=nowhere"], "no such file"),
        (["model.num_key_value_heads=3"], "not divisible"),
        (["-m", "trainer.seed=1,2", "debug=fast", "hydra.launcher.slots=0"], "hydra.launcher.slots=0: must be"),
    ],
)
def test_what_a_run_would_refuse_a_plan_refuses(say, overrides, words):
    code, text = say("optimizer.lr=1e-3", *overrides)
    assert (code, words in text) == (2, True), text
