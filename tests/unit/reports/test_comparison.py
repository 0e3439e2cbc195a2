"""Runs side by side."""

import json

from pages import check
from runs import ENVIRONMENT, finished, make_run, step

from xtuner_hydra.reports import commands
from xtuner_hydra.reports.comparison import compare, differing, write_comparison
from xtuner_hydra.reports.findings import Findings
from xtuner_hydra.results.run import load_run


def runs(directory, *kinds):
    return [load_run(make_run(directory / f"{number}", **kind)) for number, kind in enumerate(kinds)]


def test_keys_that_differ_in_what_is_learnt_make_the_settings(tmp_path):
    made = runs(
        tmp_path,
        finished(2.0, optimizer__lr=1e-4, data__cache_dir="/a", sweep__keep="all"),
        finished(3.0, optimizer__lr=2e-4, data__cache_dir="/b", checkpoint__interval=5),
    )
    assert differing(made) == ["optimizer.lr"]
    result = compare(made, tmp_path)
    assert result.best_setting.swept == {"optimizer.lr": 1e-4}
    assert [job.name for job in result.jobs] == ["0", "1"]


def test_runs_that_differ_in_their_seed_are_repeats(tmp_path):
    result = compare(runs(tmp_path, finished(2.0, trainer__seed=0), finished(3.0, trainer__seed=1)), tmp_path)
    assert [setting.mean for setting in result.settings] == [2.5]


def test_a_run_and_its_rerun_are_one_seed(tmp_path):
    made = runs(tmp_path, finished(2.0), finished(2.0), finished(3.0, optimizer__lr=2e-4))
    found = Findings(compare(made, tmp_path))
    assert [len(setting.values) for setting in found.settings] == [1, 1]
    assert "seeds" not in found.answer


def test_without_evaluations_training_loss_decides(tmp_path):
    made = runs(tmp_path, {"rows": [step(1, 2.0)], "optimizer__lr": 1e-4}, {"rows": [step(1, 1.0)], "optimizer__lr": 2e-4})
    result = compare(made, tmp_path)
    assert (result.plan.metric, result.best_job.number) == ("train/loss", 1)
    assert any("noisy" in doubt for doubt in result.doubts)


def test_the_page_links_to_runs_from_where_it_stands(tmp_path):
    made = runs(tmp_path / "runs and more", finished(2.0, optimizer__lr=1e-4), finished(3.0, optimizer__lr=2e-4))
    page = tmp_path / "pages" / "mine.html"
    page.parent.mkdir()
    write_comparison(made, page)
    read = check(page.read_text())
    assert "../runs%20and%20more/0" in read.links
    assert read.words.startswith("mine: lr 1e-4 leads")


def test_commands_find_the_options_that_a_run_found(tmp_path):
    directory = make_run(tmp_path / "0", **finished(2.0))
    (directory / "environment.json").write_text(
        json.dumps({**ENVIRONMENT, "command": "python -m xtuner_hydra --config-dir my_conf experiment=mine", "directory": "/home/me"})
    )
    (command, *_) = commands.repeat(result := compare([load_run(directory)], tmp_path), result.best_job).splitlines()
    assert command.startswith("python -m xtuner_hydra --config-dir /home/me/my_conf")
