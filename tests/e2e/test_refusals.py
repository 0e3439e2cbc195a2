"""Bad input: one readable message, exit code 2, no traceback, nothing created."""

import json

import pytest

import xtuner_hydra

GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
LINE = json.dumps(GOOD).encode()


def lines(*records):
    return b"\n".join(record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)


def refused(cli, *args):
    before = sorted(path for path in cli.directory.rglob("*") if ".cache" not in path.parts)
    done = cli(*args)
    assert done.code == 2, done.text
    assert "Traceback" not in done.text
    assert sorted(path for path in cli.directory.rglob("*") if ".cache" not in path.parts) == before
    return done.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+optimizer.lrr=1", "Did you mean optimizer.lr?"),
        ("model.num_key_value_heads=3", "not divisible by model.num_key_value_heads=3"),
        ("data.path=nowhere.jsonl", "no such file"),
        ("hydra.run.dir=/proc/none", "cannot be written"),
        ("model.pretrained=nowhere", "nowhere"),
        ("model.tokenizer=nobody/nothing-at-all", "model.tokenizer=byte"),
        ("checkpoint.resume=nowhere", "no such file"),
        ("parallelism.nproc_per_node=2", "not divisible by the 2"),
        ("trainer.epochs=1", "set one of them to null"),
    ],
)
def test_config(cli, override, words):
    assert words in refused(cli, "debug=fast", override)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (lines(GOOD, b"{broken"), "line 2: not"),
        (lines(GOOD, GOOD, b'["\xff\xfe"]'), "line 3"),
        (lines([{"role": "robot", "content": "x"}]), "robot"),
        (lines([{"role": "user", "content": 3}, GOOD[1]]), "content must be text"),
        (lines([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, GOOD[1]]), "image_url"),
        (lines([GOOD[0]]), "without an assistant turn"),
        (lines({"text": "no messages"}), "messages"),
        (lines([{**GOOD[0]}, {**GOOD[1], "loss": False}]), "supervised"),
    ],
)
def test_data(cli, content, words):
    (cli.directory / "data.jsonl").write_bytes(content)
    message = refused(cli, "debug=fast", "data.path=data.jsonl")
    assert words in message
    assert "data.jsonl" in message


def test_directory_without_files(cli):
    (cli.directory / "empty").mkdir()
    assert "without *.jsonl" in refused(cli, "debug=fast", "data.path=empty")


def test_sample_longer_than_the_pack(cli):
    (cli.directory / "data.jsonl").write_bytes(lines(GOOD, [GOOD[0], {"role": "assistant", "content": "x" * 300}]))
    assert "overlong" in refused(cli, "debug=fast", "data.path=data.jsonl", "data.overlong=error")


def test_showing_a_config_checks_it_too(cli):
    assert "Did you mean optimizer.lr?" in refused(cli, "--cfg", "job", "++optimizer.lrr=1")


def test_an_unknown_word_is_no_verb(cli):
    assert "Did you mean plan?" in refused(cli, "plam")
    assert "train: no such command; training needs none" in refused(cli, "train", "debug=fast")
    assert "Did you mean optimizer" in refused(cli, "--cfg", "job", "--package", "optimizerr")


def test_a_verb_that_is_not_the_first_word_is_known(cli):
    assert "plan: a command comes first" in refused(cli, "-m", "debug=fast", "plan")
    assert "--config-dir plan: no such directory" in refused(cli, "plan", "--config-dir", "plan")


def test_a_sweep_with_one_bad_job_starts_none(cli):
    message = refused(cli, "-m", "debug=fast", "model.num_key_value_heads=2,3")
    assert "job 2 of 2" in message


def test_showing_creates_nothing_and_succeeds(cli):
    for args, words in (
        (["--help"], "GROUP=OPTION"),
        (["--cfg", "job", "--resolve"], "lr: 6.0e-05"),
        (["plan", "debug=fast"], "steps           2"),
        (["--version"], f"xtuner_hydra {xtuner_hydra.__version__}"),
    ):
        done = cli(*args)
        assert (done.code, words in done.out) == (0, True), done.text
    assert [path.name for path in cli.directory.iterdir()] == [".cache"]
