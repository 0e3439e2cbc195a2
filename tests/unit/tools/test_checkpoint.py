"""checkpoint shows what is saved, finds what is damaged, and never removes the last that is whole."""

import os
import shutil
from datetime import datetime

import pytest
from checkpoints import flip_bit, make_checkpoint, make_export
from run_dirs import make_run

from xtuner_hydra import run_dir
from xtuner_hydra.__main__ import main
from xtuner_hydra.checkpoint.commit import damage


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that has kept more than its config keeps: keep=1, keep_every=4, keep_best=eval/loss, hf_keep=1."""
    monkeypatch.chdir(tmp_path)
    directory = make_run(tmp_path / "run", losses=[3.0, 2.0])
    config = run_dir.read_config(directory)
    config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.keep_best = 1, 4, "eval/loss"
    run_dir.write_config(directory, config)
    for step, loss in ((2, 2.5), (3, 1.25), (4, None), (5, 2.0), (6, None)):
        make_checkpoint(directory / "checkpoints", step, **({} if loss is None else {"eval_loss": loss}))
    for step in (1, 2):
        make_export(directory / "hf", step)
    (directory / "hf" / "latest").symlink_to("step-2")
    return directory


def standing(run):
    return {name: sorted(path.name for path in (run / name).iterdir()) for name in ("checkpoints", "hf")}


@pytest.fixture
def said(capsys):
    """(exit code, lines on stdout, stderr) of a command line."""

    def run_it(*arguments):
        capsys.readouterr()
        code = main(["checkpoint", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run_it


def cells(lines):
    """Rows of a table by the columns' places in its head: name -> cell."""
    head = lines[0]
    return {line.split()[0]: line for line in lines[1:]}, head.split()


def test_a_list_shows_what_there_is_and_why_it_stays(run, said):
    (run / "checkpoints" / ".step-7.tmp").mkdir()
    (run / "checkpoints" / "step-5" / "state.json").unlink()
    for path in run.glob("*/step-*/manifest.json"):
        os.utime(path, (time := datetime(2026, 1, 2, 3, 30).timestamp(), time))
    code, lines, _ = said("list", "run")
    rows, head = cells(lines)
    assert code == 0
    assert head == ["directory", "size", "saved", "eval/loss", "kept", "as", "state"]
    assert list(rows) == [*(f"checkpoints/step-{step}" for step in range(2, 7)), "checkpoints/.step-7.tmp", "hf/step-1", "hf/step-2"]
    for name, end in {
        "checkpoints/step-2": "2.5000 surplus whole",
        "checkpoints/step-3": "1.2500 best eval/loss whole",
        "checkpoints/step-4": ":30 every 4 whole",
        "checkpoints/step-5": "state.json is missing",
        "checkpoints/step-6": ":30 newest whole",
        "checkpoints/.step-7.tmp": "left by an interrupted save",
        "hf/step-1": ":30 surplus whole",
        "hf/step-2": "0.6000 newest whole",  # the run's rows: evaluated after step 2
    }.items():
        assert " ".join(rows[name].split()).endswith(end), rows[name]
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step-2").iterdir())
    assert rows["checkpoints/step-2"].split()[1:5] == [str(size), "B", "2026-01-02", "03:30"]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("run/checkpoints", [f"checkpoints/step-{step}" for step in range(2, 7)]),
        ("run/hf/", ["hf/step-1", "hf/step-2"]),
        ("run/checkpoints/step-4", ["checkpoints/step-4"]),
    ],
)
def test_a_part_of_a_run_can_be_named(run, said, path, names):
    code, lines, _ = said("list", path)
    assert (code, list(cells(lines)[0])) == (0, names)
    code, lines, _ = said("verify", path)
    assert (code, [line.partition(":")[0] for line in lines]) == (0, names)


def test_copies_of_checkpoints_are_listed_without_a_config(run, said, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "copies")
    code, lines, _ = said("list", "copies")
    assert code == 0
    assert lines[0].split() == ["directory", "size", "saved", "eval/loss", "state"]
    assert list(cells(lines)[0]) == [f"step-{step}" for step in range(2, 7)]


def test_verify_reads_everything(run, said):
    code, lines, _ = said("verify", "run")
    assert code == 0
    assert len(lines) == 7
    assert all(": whole (" in line for line in lines)


def test_verify_finds_a_flipped_bit_and_says_what_to_do(run, said):
    flip_bit(run / "checkpoints" / "step-6" / "rank-0.safetensors")
    assert said("list", "run/checkpoints")[1][-1].endswith("whole")
    code, lines, _ = said("verify", "run")
    assert code == 1
    assert lines[4] == "checkpoints/step-6: DAMAGED: rank-0.safetensors differs from what was saved"
    assert "resume=auto passes over it and goes on from another (checkpoints/step-5)" in lines[5]
    assert f"xtuner-hydra checkpoint prune {run} --damaged" in lines[5]


def test_verify_of_the_only_one_says_that_none_is_left(run, said):
    for step in (2, 3, 4, 5):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    flip_bit(run / "checkpoints" / "step-6" / "state.json")
    code, lines, _ = said("verify", "run/checkpoints")
    assert code == 1
    assert "no other is whole" in lines[-1]


def test_verify_of_a_damaged_export_says_how_to_write_it_again(run, said):
    (run / "hf" / "step-2" / "model.safetensors").write_bytes(b"weight")
    code, lines, _ = said("verify", "run/hf")
    assert (code, lines[1]) == (1, "hf/step-2: DAMAGED: model.safetensors has 6 bytes, not 7")
    assert f"xtuner-hydra export {run} --to DIR --step 2" in lines[2]


def test_prune_removes_what_the_config_does_not_keep(run, said):
    (run / "checkpoints" / ".step-2.old").mkdir()  # of the same name as one that goes
    before = standing(run)
    code, dry, _ = said("prune", "run", "--dry-run")
    assert (code, standing(run)) == (0, before)
    code, lines, _ = said("prune", "run")
    assert code == 0
    assert standing(run) == {"checkpoints": ["step-3", "step-4", "step-6"], "hf": ["latest", "step-2"]}
    assert [line.split(" (")[0] for line in lines[:-1]] == [
        "removed checkpoints/.step-2.old",
        "removed checkpoints/step-2",
        "removed checkpoints/step-5",
        "removed hf/step-1",
    ]
    assert [line.replace("would remove", "removed").replace("would be free", "are free") for line in dry] == lines
    assert said("prune", "run")[1] == ["0 B are free again"]


def test_the_room_that_prune_names_is_the_room_that_it_makes(run, said):
    (run / "checkpoints" / "step-2" / "rank-0.safetensors").write_bytes(b"x" * 3_000_000)  # damaged, and large
    lines = said("prune", "run/checkpoints", "--damaged")[1]
    assert lines[-1] == "2.9 MiB are free again"


@pytest.mark.parametrize(("keep", "left"), [(1, [3, 4, 6]), (2, [3, 4, 5, 6]), (9, [2, 3, 4, 5, 6])])
def test_keep_takes_the_place_of_the_configs_number_alone(run, said, keep, left):
    said("prune", "run", "--keep", keep)
    assert standing(run)["checkpoints"] == [f"step-{step}" for step in left]


def test_a_damaged_one_does_not_count_and_goes_only_where_that_is_said(run, said):
    flip_bit(run / "checkpoints" / "step-6" / "rank-0.safetensors")
    code, lines, _ = said("prune", "run/checkpoints")
    assert code == 0
    assert standing(run)["checkpoints"] == ["step-3", "step-4", "step-5", "step-6"]  # step-5 is the newest that is whole
    assert any(line.startswith("left checkpoints/step-6, damaged: rank-0.safetensors") and "--damaged" in line for line in lines)
    said("prune", "run/checkpoints", "--damaged")
    assert standing(run)["checkpoints"] == ["step-3", "step-4", "step-5"]


def test_a_checkpoint_that_a_crash_left_aside_is_not_a_leftover(run, said):
    """It was being saved a second time, and nothing is in its place: a resumed run restores its name."""
    newest = run / "checkpoints" / "step-6"
    newest.rename(newest.with_name(".step-6.replaced"))
    assert said("prune", "run")[0] == 0
    assert ".step-6.replaced" in standing(run)["checkpoints"]
    (newest.with_name(".step-5.replaced")).mkdir()  # its place is taken
    said("prune", "run")
    assert ".step-5.replaced" not in standing(run)["checkpoints"]


def test_where_none_is_whole_nothing_goes(run, said):
    """Nor what an interrupted save has left: it may be all there is to be saved by hand."""
    (run / "checkpoints" / ".step-9.tmp").mkdir()
    for path in (run / "checkpoints").glob("step-*"):
        flip_bit(path / "rank-0.safetensors")
    before = standing(run)["checkpoints"]
    code, lines, _ = said("prune", "run/checkpoints", "--damaged", "--keep", "1")
    assert (code, standing(run)["checkpoints"]) == (0, before)
    assert "none is whole, so nothing is removed" in lines[0]


def test_an_export_that_latest_points_to_stays(run, said):
    """A run that went back to an earlier step has its newest export under a smaller number."""
    (run / "hf" / "latest").unlink()
    (run / "hf" / "latest").symlink_to("step-1")
    said("prune", "run/hf")
    assert standing(run)["hf"] == ["latest", "step-1"]


def test_latest_points_to_a_whole_export_when_its_own_was_damaged(run, said):
    (run / "hf" / "step-2" / "model.safetensors").unlink()
    said("prune", "run/hf", "--damaged")
    assert standing(run)["hf"] == ["latest", "step-1"]
    assert os.readlink(run / "hf" / "latest") == "step-1"
    assert damage(run / "hf" / "latest" / ".." / "step-1") is None


def test_copies_are_pruned_by_number(run, said, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "copies")
    said("prune", "copies", "--keep", "2")
    assert sorted(os.listdir(tmp_path / "copies")) == ["step-5", "step-6"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "nowhere"], "nowhere: no such directory"),
        (["verify", "."], ".: holds no checkpoint or export"),
        (["prune", "run/checkpoints/step-4"], "name its run"),
        (["prune", "copies"], "add --keep N"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(run, said, tmp_path, arguments, words):
    shutil.copytree(run / "checkpoints", tmp_path / "copies")
    code, lines, err = said(*arguments)
    assert (code, lines) == (2, [])
    assert words in err
    assert err.count("\n") == 1


def test_a_run_that_is_running_is_not_pruned(run, said):
    run_dir.write_status(run, "running", step=2)
    before = standing(run)
    for path in ("run", "run/checkpoints"):
        code, _, err = said("prune", path)
        assert (code, standing(run)) == (2, before)
        assert "is running" in err
    assert said("list", "run")[0] == said("verify", "run")[0] == 0


def test_at_least_one_must_stay(run):
    with pytest.raises(SystemExit) as stop:
        main(["checkpoint", "prune", "run", "--keep", "0"])
    assert stop.value.code == 2


def test_a_run_that_was_trained_is_whole(cli):
    """The real command lines, in processes of their own."""
    assert cli("debug=fast", "tracking=none", "checkpoint.interval=1", "hydra.run.dir=run").code == 0
    checked = cli("checkpoint", "verify", "run")
    assert (checked.code, [line.partition(" (")[0] for line in checked.out.splitlines()]) == (
        0,
        ["checkpoints/step-1: whole", "checkpoints/step-2: whole", "hf/step-2: whole"],
    )
    listed = cli("checkpoint", "list", "run")
    assert listed.code == 0
    assert "newest" in listed.out
    flip_bit(next((cli.directory / "run" / "hf" / "step-2").glob("*.safetensors")), at=-1)
    assert cli("checkpoint", "verify", "run").code == 1
