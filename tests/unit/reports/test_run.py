"""The page of a run."""

import json
import time

import pytest
from pages import check
from runs import ENVIRONMENT, evaluation, make_run, make_sweep, step

from xtuner_hydra.errors import RefusedError
from xtuner_hydra.reports.run import write_run

EVIL = "<script>alert(1)</script>"
ROWS = [*(step(number, 3.0 / number) for number in range(1, 9)), evaluation(4, 1.5), evaluation(8, 0.75)]


def page_of(directory):
    return check(write_run(directory).read_text())


def test_what_was_changed_comes_first(tmp_path):
    make_run(tmp_path, ROWS, overrides=["optimizer.lr=1e-4"])
    (tmp_path / "changed.json").write_text(json.dumps({"optimizer.lr": [6e-05, 1e-4], "data.path": ["a", EVIL]}))
    words = page_of(tmp_path).words
    assert "optimizer.lr 6e-5 1e-4" in words
    assert words.index("What differs from the defaults") < words.index("Loss over tokens") < words.index("Evaluation")
    assert words.index("Evaluation") < words.index("Environment") < words.index("Files")


def test_without_a_record_of_changes_what_was_typed_is_shown(tmp_path):
    make_run(tmp_path, ROWS, overrides=["optimizer.lr=1e-4", f"data.path={EVIL}"])
    words = page_of(tmp_path).words
    assert "The overrides as they were typed." in words
    assert "optimizer.lr 1e-4" in words


def test_the_page_has_the_numbers_of_the_run(tmp_path):
    words = page_of(make_run(tmp_path, ROWS)).words
    assert "Completed after 8 steps and 800 tokens: eval/loss 0.750, train/loss 0.375." in words
    assert "8 800 0.7500 2 500" in words
    assert "95.0% full" in words
    assert f"{ENVIRONMENT['git']['commit'][:12]} with uncommitted changes" in words
    assert "-<old> +<new>" in words


def test_a_failed_run_says_why(tmp_path):
    make_run(tmp_path, ROWS[:2], state="failed", error=f"step 3: {EVIL}\nTraceback")
    page = page_of(tmp_path)
    assert f"What went wrong step 3: {EVIL} Traceback" in page.words
    assert "logs/rank0.log" in page.links


@pytest.mark.parametrize("rows", [[], [step(1, None)], [step(1, 2.0)], [evaluation(0, 3.0)], [step(1, 2.0), evaluation(1, None)]])
@pytest.mark.parametrize("state", ["running", "failed", "completed", "interrupted"])
def test_any_run_has_a_page(tmp_path, rows, state):
    assert state in page_of(make_run(tmp_path, rows, state=state)).words


def test_files_are_listed_with_sizes_and_links_that_lead_somewhere(tmp_path):
    make_run(tmp_path, ROWS)
    (tmp_path / "checkpoints" / "step-8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-8" / "a b.bin").write_bytes(b"x" * 2048)
    page = page_of(tmp_path)
    assert "checkpoints/ to resume from 1 file 2.0 KiB" in page.words
    assert all((tmp_path / link).exists() for link in page.links)


def test_ten_thousand_steps_are_quick_and_small(tmp_path):
    make_run(tmp_path, [step(number, 5.0 / number**0.2) for number in range(1, 10_001)])
    started = time.process_time()
    path = write_run(tmp_path)
    assert time.process_time() - started < 10  # about half a second on an idle machine
    assert path.stat().st_size < 300_000


def test_what_stands_beside_a_run_does_not_cost_it_its_page(tmp_path):
    directory = make_run(tmp_path / "run", [step(1, 3.0)])
    (tmp_path / "sweep.json").write_text("of another version")
    (directory / "gone").symlink_to(directory / "nothing")
    page = write_run(directory).read_text()
    assert "xtuner_hydra optimizer.lr=1e-4" in page
    assert "Completed after 1 step and 100 tokens" in page


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="not a run directory"):
        write_run(tmp_path)


def test_samples_are_shown_by_prompt_the_last_answer_first(tmp_path):
    make_run(tmp_path, ROWS)
    given = [(4, "why?", "no idea"), (4, EVIL, "a"), (8, "why?", f"because\n{EVIL}"), (8, EVIL, "b")]
    lines = [json.dumps({"train/step": step, "prompt": prompt, "text": text}) + "\n" for step, prompt, text in given]
    (tmp_path / "samples.jsonl").write_text("".join(lines) + '{"train/st')
    words = page_of(tmp_path).words
    assert f"why? step 8 because {EVIL} 1 earlier answer step 4 no idea {EVIL} step 8 b 1 earlier answer step 4 a" in words
    assert words.index("Evaluation") < words.index("Samples") < words.index("Environment")


def test_without_samples_nothing_is_said_of_them(tmp_path):
    assert "Samples" not in page_of(make_run(tmp_path, ROWS)).words


def test_a_job_of_a_sweep_is_run_again_on_its_own(tmp_path):
    """The command of its environment would run the whole sweep."""
    make_sweep(tmp_path, [({"optimizer.lr": 1e-4}, {"rows": ROWS, "overrides": ["debug=fast", "optimizer.lr=1e-4", "sweep.keep=all"]})])
    words = page_of(tmp_path / "0_job").words
    assert "Command line: python -m xtuner_hydra debug=fast optimizer.lr=1e-4 copy" in words
    assert ENVIRONMENT["command"] not in words
