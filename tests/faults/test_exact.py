"""N steps in one go, and k steps and the rest after a resume: the same metrics and the same weights, bit for bit."""

import json
import shutil
from collections import Counter

import pytest
from chats import chat, write_lines
from conftest import read_status
from exactness import assert_same, copy_until, set_config, trajectory
from forks import prepare, train_on

CHATS = [chat(f"answer {number}: " + "so it is " * 6, f"question {number}?") for number in range(6)]
TWO_EPOCHS = (
    "debug=fast",
    "tracking=none",
    "data.eval_path=null",
    "checkpoint.hf_interval=null",
    "trainer.total_steps=null",
    "trainer.epochs=2",
)
EVERY_STEP = ("checkpoint.interval=1", "checkpoint.keep=99")
LORA = ("model.adapter=lora", "model.lora.rank=4", "model.lora.dropout=0.3", "optimizer.lr=1e-3")
BEHIND = ("checkpoint.asynchronous=true",)


def case(ranks, *overrides, slow=True):
    return pytest.param(
        ranks, overrides, id="-".join([str(ranks), *(name.split("=")[1] for name in overrides)]), marks=[pytest.mark.faults] * slow
    )


CASES = [
    case(1, *LORA, *BEHIND, "data.num_workers=0", slow=False),
    case(2, *BEHIND, "trainer.global_batch_size=2", slow=False),
    case(1, "data.pack_strategy=best_fit", "data.num_workers=2"),
    case(1, "data.pack_strategy=soft", *BEHIND, "data.num_workers=0"),
    case(1, "data.pack_strategy=hard", "data.num_workers=2"),
    case(1, "data.pack_strategy=none", *BEHIND, "data.num_workers=2"),
    case(1, "data.pack_strategy=none", "trainer.global_batch_size=2"),
    case(2, "data.pack_strategy=soft", "trainer.global_batch_size=2"),
    case(2, "data.pack_strategy=hard", "trainer.global_batch_size=2", *BEHIND),
    case(2, "data.pack_strategy=none", "trainer.global_batch_size=4", *LORA),
]


def prepared(directory, *overrides):
    write_lines(directory / "chats.jsonl", [{"messages": messages} for messages in CHATS])
    return prepare(directory, *TWO_EPOCHS, "data.path=chats.jsonl", *overrides)


@pytest.mark.parametrize(("ranks", "overrides"), CASES)
def test_a_resumed_run_repeats_the_rest(tmp_path, ranks, overrides):
    """From the middle of an epoch, and from between two."""
    whole = prepared(tmp_path, *EVERY_STEP, *overrides)
    codes, text = train_on(whole, ranks)
    assert codes == [0] * ranks, text
    rows = trajectory(whole)
    steps = len(rows)
    edge = next(row[0] for row in rows if row[-1] >= 1)
    assert 0 < edge < steps
    for cut in sorted({edge - 1 or 1, edge, edge + 1} - {steps}):
        run = copy_until(whole, tmp_path / f"from-{cut}", cut)
        codes, text = train_on(run, ranks)
        assert codes == [0] * ranks, text
        assert f"step {cut}/{steps}" in text
        assert_same(run, whole, steps)


def test_saving_changes_nothing(tmp_path):
    runs = {}
    for name, overrides in {"never": ("checkpoint.interval=null",), "sync": EVERY_STEP, "async": (*EVERY_STEP, *BEHIND)}.items():
        (tmp_path / name).mkdir()
        runs[name] = prepared(tmp_path / name, *LORA, *overrides)
        assert train_on(runs[name])[0] == [0]
    assert trajectory(runs["never"]) == trajectory(runs["sync"])
    assert_same(runs["async"], runs["sync"], len(trajectory(runs["sync"])))


def test_other_numbers_of_ranks_see_every_sample_once_in_the_same_steps(tmp_path):
    """1 -> 2 -> 4 -> 1 ranks, sharded, replicated, both, stopped by a signal between."""
    run = prepared(
        tmp_path, "data.pack_strategy=none", "trainer.global_batch_size=4", "parallelism.param_dtype=float32", "trainer.epochs=4"
    )
    whole = copy_of(run, tmp_path / "whole")
    assert trained(whole, tmp_path / "documents", 1) == 0
    expected = documents(tmp_path / "documents", range(1, 9))
    set_config(run, "checkpoint.resume", "auto")
    seen = {}
    stages = [(1, 1, 1), (2, 2, 2), (4, 1, 4), (4, 2, 5), (2, 1, 7), (1, 1, 8)]  # ranks, copies of the weights, last step
    for number, (ranks, copies, last) in enumerate(stages):
        set_config(run, "parallelism.dp_replicate", copies)
        stop = {"FAULT": f"SIGTERM@{last}", "FAULT_BATCH": str(4 // ranks - 1), "FAULT_RANK": str(ranks - 1)} if last < 8 else {}
        assert trained(run, tmp_path / f"documents-{number}", ranks, **stop) == (75 if stop else 0)
        assert read_status(run)["step"] == last
        seen |= documents(tmp_path / f"documents-{number}", range(max(seen, default=0) + 1, last + 1))
    assert seen == expected
    for epoch in range(4):
        of_epoch = sum((names for at, names in seen.values() if at == epoch), Counter())
        assert set(of_epoch.values()) == {1}
        assert len(of_epoch) == len(CHATS)
    for ours, theirs in zip(trajectory(run), trajectory(whole), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)  # the loss
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)  # the gradient's norm
        assert ours[3:] == theirs[3:]


def copy_of(run, copy):
    shutil.copytree(run, copy)
    return copy


def trained(run, directory, ranks, **environment):
    """The exit code that all ranks agree on."""
    directory.mkdir()
    codes, text = train_on(run, ranks, DOCUMENTS=str(directory), **environment)
    assert len(set(codes)) == 1, text
    return codes[0]


def documents(directory, steps):
    """Step -> what all ranks trained on in it."""
    found = {}
    for path in directory.glob("rank-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["step"] in steps:
                found.setdefault(line["step"], (line["epoch"], Counter()))[1].update(line["documents"])
    return found
