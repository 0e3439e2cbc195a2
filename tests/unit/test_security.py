"""What SECURITY.md promises: no pickles, no code of strangers, nothing outside a run directory, nothing that a page or a terminal would obey."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_dirs
import runs

import xtuner_hydra
from xtuner_hydra import run_dir
from xtuner_hydra.__main__ import main
from xtuner_hydra.config.names import is_plain, job_name, run_name
from xtuner_hydra.config.schema import ModelConfig, WandbConfig
from xtuner_hydra.config.strict import from_yaml, to_yaml
from xtuner_hydra.data.chat_templates import ChatTemplate
from xtuner_hydra.data.formats import Conversation, Message
from xtuner_hydra.errors import ConfigError, RefusedError
from xtuner_hydra.model.pretrained import check_pretrained
from xtuner_hydra.reports.pictures import loss_png
from xtuner_hydra.results.glance import glance
from xtuner_hydra.results.run import load_run
from xtuner_hydra.results.sweep import SweepPlan, read_sweep
from xtuner_hydra.sweeps.driver import Driver

PACKAGE = Path(xtuner_hydra.__file__).parent
TREES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


# --- pickles and code

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pandas"}
LOADERS = {"torch.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "np.fromstring", "torch.jit.load", "torch.hub.load"}
LOADERS |= {"dcp.FileSystemReader", "FileSystemReader", "dcp.FileSystemWriter", "FileSystemWriter"}  # pickles
NAMED = {
    ("results/glance.py", "yaml.load"),  # with the safe loader
    ("sweeps/submitit.py", "self.job.result"),  # what a job of this very sweep has written
}


def dotted(node):
    """`a.b.c` of a name or attribute, `` of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls():
    return [(path, node) for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_in_the_package_unpickles():
    imported = {
        (path, name.partition(".")[0])
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not {(path, name) for path, name in imported if name in UNPICKLERS}
    risky = {(path, dotted(node.func)) for path, node in calls() if dotted(node.func) in LOADERS | {"yaml.load", "self.job.result"}}
    assert risky == NAMED


def test_numpy_never_unpickles_and_no_text_is_run_as_code():
    for path, node in calls():
        assert dotted(node.func) not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), path
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "trust_remote_code", "shell"):
                assert ast.unparse(keyword.value) == "False", (path, keyword.arg)


def test_the_only_import_by_a_name_that_a_config_gives_is_data_format():
    users = {path for path, node in calls() if dotted(node.func).endswith("import_module")}
    assert users == {"data/own_format.py", "__main__.py", "sweeps/plugin.py"}  # the verbs, and hydra_plugins


def test_only_a_worker_opens_the_caches_that_data_json_names():
    """Which a run of this command has just written; a stranger's data.json is never believed."""
    assert {path for path, node in calls() if dotted(node.func) == "PreparedData.load"} == {"worker.py"}


# --- weights and models of strangers


def model(directory, **config):
    directory.mkdir(exist_ok=True)
    shape = dict(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    values = {"model_type": "qwen3", **shape, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, **config}
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig(**shape, num_key_value_heads=1, head_dim=8, pretrained=str(directory))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(tmp_path, name):
    config = model(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(ConfigError, match=rf"pickled \({Path(name).suffix}\), which can run code"):
        check_pretrained(config)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "", 7])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    config = model(tmp_path / "m")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ConfigError, match="weights are files in the directory itself"):
        check_pretrained(config)


def test_code_that_a_config_json_names_is_ignored_in_words(tmp_path, caplog):
    config = model(tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "m" / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors"), caplog.at_level("WARNING", logger="xtuner_hydra"):
        check_pretrained(config)
    assert "auto_map" in caplog.text
    assert "never run" in caplog.text


def test_code_that_a_tokenizer_names_is_refused(tmp_path):
    from xtuner_hydra.data.hf_tokenizer import HFTokenizer

    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    names = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        HFTokenizer(tmp_path, str(tmp_path))
    assert not marker.exists()


# --- chat templates

CHAT = Conversation([Message("user", "a", supervised=False), Message("assistant", "b", supervised=True)])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation.*unsafe"),
        ("{{ messages.__class__.__name__ }}", "refuses this conversation.*unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "refuses this conversation"),
        ("{{ messages.append(1) }}", "refuses this conversation.*unsafe"),
        ("{% import 'os' as os %}", "this conversation"),
        ("{% include '/etc/passwd' %}", "this conversation"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails on this conversation.*[Rr]ange too big"),
        ("{{ 1 / 0 }}", "fails on this conversation.*division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "this conversation"),
    ],
)
def test_a_template_stays_in_its_sandbox(template, words):
    with pytest.raises(ValueError, match=words):
        ChatTemplate("a stranger's", template, {}, ()).render(CHAT)


def test_a_template_without_an_end_ends_with_ctrl_c():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    try:
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate("a stranger's", endless, {}, ()).render(CHAT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- configs of strangers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("lr: ", "lr: !!python/object/apply:os.system [id] # "), r"the YAML tag !!python/object/apply:os.system has no place"),
        (("lr: ", "lr: ${oc.env:HOME} # "), "is an interpolation"),
        (("project: ", "project: ${now:%Y} # "), "is an interpolation"),
        (("optimizer:", "optimizer: &a"), "the YAML anchor a has no place"),
        (("optimizer:\n", "optimizer:\n  _target_: os.system\n"), r"optimizer\._target_: names code to call"),
        (("params: {}", "params: {a: {_target_: os.system}}"), r"sweep\.params\.a\._target_: names code to call"),
    ],
)
def test_a_runs_config_is_plain_data(tmp_path, capsys, change, words):
    text = to_yaml(runs.config())
    assert change[0] in text
    text = text.replace(*change, 1)
    with pytest.raises(RefusedError, match=words):
        from_yaml(text)
    run = runs.make_run(tmp_path / "run", [runs.step(1, 2.0)])
    (run / "config.yaml").write_text(text)
    for verb in (["report", str(run)], ["diff", str(run), str(run)], ["chat", str(run), "-p", "hi"]):
        assert main(verb) == 2
        assert "config.yaml cannot be read" in capsys.readouterr().err
    if "_target_" not in text:
        assert "config.yaml" in glance(run).damage


@pytest.mark.parametrize("key", ["project", "entity", "group", "name"])
@pytest.mark.parametrize("value", ["../../x", "/etc/x", "a\x1b[2J", "a\nb", "x" * 200, " "])
def test_names_for_wandb_are_names(key, value):
    with pytest.raises(ConfigError, match=f"tracking.wandb.{key}="):
        WandbConfig(**{key: value})


def test_names_that_are_made_are_names():
    assert is_plain(run_name({"rerun": "../../x"}, []))
    assert is_plain(run_name({"model": "/etc", "data": ".."}, ["optimizer.lr=../../x"]))
    assert is_plain(job_name(0, ["data.path=../../x", "tracking.wandb.name=.."]))


# --- links out of a run directory


@pytest.fixture
def outside(tmp_path):
    target = tmp_path / "outside"
    target.mkdir()
    (target / "keep.txt").write_text("precious")
    return target


def stranger(tmp_path, name, target):
    """A run in which `name` is a link to `target`."""
    run = runs.make_run(tmp_path / "run", [runs.step(1, 2.0), runs.evaluation(1, 2.0)])
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        path.unlink()
    elif path.is_dir():
        path.rename(tmp_path / "aside")
    path.symlink_to(target)
    return run


LINKS = ["config.yaml", "metrics.jsonl", "status.json", "samples.jsonl", "report.html", "loss.png", "hf/latest", "checkpoints", "logs"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_a_run_is_not_followed(tmp_path, capsys, outside, name):
    run = stranger(tmp_path, name, outside if name in ("checkpoints", "logs", "hf/latest") else outside / "keep.txt")
    verbs = [["report"], ["chat", "-p", "hi"], ["export", "--to", str(tmp_path / "to")], ["evaluate"], ["rerun"]]
    for verb, *rest in verbs:
        assert main([verb, str(run), *rest]) == 2
        told = capsys.readouterr().err
        assert f"{name}: a link that leads out of" in told
        assert "precious" not in told
    assert main(["diff", str(run), str(run)]) == 2
    assert glance(run).state == "damaged"
    with pytest.raises(RefusedError, match="leads out of"):
        run_dir.refuse_unusable(run, resuming=True)
    assert (outside / "keep.txt").read_text() == "precious"
    assert list(outside.iterdir()) == [outside / "keep.txt"]


def test_a_link_inside_and_a_link_to_the_whole_run_are_fine(tmp_path):
    run = runs.make_run(tmp_path / "disk" / "run", [runs.step(1, 2.0)])
    (run / "hf" / "step-1").mkdir(parents=True)
    (run / "hf" / "latest").symlink_to("step-1")
    (tmp_path / "link").symlink_to(run)
    assert load_run(tmp_path / "link").step == 1


def test_a_pipe_in_a_run_is_refused_rather_than_waited_for(tmp_path):
    run = runs.make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(RefusedError, match="neither a file nor a directory"):
        load_run(run)


def test_a_report_is_not_written_through_a_link(tmp_path, outside):
    """Even one that has come since the run was read."""
    from xtuner_hydra.files import write_text

    (tmp_path / "report.html").symlink_to(outside / "keep.txt")
    write_text(tmp_path / "report.html", "new")
    assert (outside / "keep.txt").read_text() == "precious"


def sweep_with(tmp_path, name):
    sweep = runs.make_sweep(
        tmp_path / "sweep", [({"optimizer.lr": 1e-4}, runs.finished(2.0)), ({"optimizer.lr": 1e-3}, runs.finished(3.0))]
    )
    plan = json.loads((sweep / "sweep.json").read_text())
    plan["jobs"][1]["name"] = name
    (sweep / "sweep.json").write_text(json.dumps(plan))
    return sweep


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b", ""])
def test_a_job_of_a_sweep_cannot_be_elsewhere(tmp_path, capsys, outside, name):
    sweep = sweep_with(tmp_path, name)
    for verb in (["report", str(sweep)], ["wandb", "sync", "--dry-run", str(sweep)]):
        assert main(verb) == 2
        assert "a job's directory is in the sweep's" in capsys.readouterr().err


def test_a_job_behind_a_link_is_told_not_read(tmp_path, outside):
    sweep = sweep_with(tmp_path, "link")
    (sweep / "link").symlink_to(runs.make_run(outside / "other", [runs.step(1, 1.0)]))
    jobs = read_sweep(sweep).jobs
    assert [job.state for job in jobs] == ["completed", "damaged"]
    assert "leads out of" in jobs[1].error
    assert main(["report", str(sweep)]) == 0


def test_what_a_sweep_removes_is_its_own(tmp_path, outside):
    """A settled job that is a link: its checkpoints, which stand elsewhere, stay."""
    other = runs.make_run(outside / "other", [runs.step(1, 1.0)])
    (other / "checkpoints").mkdir()
    sweep = sweep_with(tmp_path, "link")
    (sweep / "link").symlink_to(other)
    own = sweep / "0_job" / "checkpoints"
    own.mkdir()
    driver = Driver.__new__(Driver)
    driver.directory, driver.plan = sweep, SweepPlan.load(sweep)
    driver.options = type("Options", (), {"keep": "none"})
    driver._keep(None)
    assert not own.exists()
    assert (other / "checkpoints").exists()


def test_wandb_sync_pushes_nothing_from_elsewhere(tmp_path, capsys, outside):
    run = runs.make_run(tmp_path / "run", [runs.step(1, 2.0)])
    part = run / "wandb" / "offline-run-1-a"
    (part / "files").mkdir(parents=True)
    (part / "run-a.wandb").write_bytes(b"")
    (part / "files" / "note.txt").symlink_to(outside / "keep.txt")
    assert main(["wandb", "sync", "--dry-run", str(run)]) == 2
    assert "leads out of" in capsys.readouterr().err


# --- pages and terminals

EVIL = "<script>alert(1)</script>"


def everywhere(text):
    """A run whose names, errors, prompts and values a stranger has chosen."""
    return {
        "overrides": [f"tracking.wandb.tags=[{text}]", f"{text}={text}"],
        "error": f"{text}\n{text}",
        "state": "failed",
        "data__path": text,
        "tracking__wandb": WandbConfig(name="".join(filter(str.isprintable, text)), tags=[text]),
    }


def test_a_report_shows_what_a_stranger_wrote_as_text(tmp_path):
    run = runs.make_run(tmp_path / "<script>alert(1)<", [runs.step(1, 2.0, **{f"x/{EVIL}": 1.0})], **everywhere(EVIL))
    (run / "samples.jsonl").write_text(json.dumps({"train/step": 1, "prompt": EVIL, "text": EVIL}) + "\n")
    (run / "environment.json").write_text(json.dumps({**runs.ENVIRONMENT, "command": EVIL, "versions": {EVIL: EVIL}, "time": EVIL}))
    (run / "changed.json").write_text(json.dumps({EVIL: [EVIL, EVIL]}))
    other = runs.make_run(tmp_path / "other", [runs.step(1, 2.0)])
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), str(other), "--to", str(tmp_path / "both.html")]) == 0
    for page in (run / "report.html", tmp_path / "both.html"):
        text = page.read_text()
        assert "alert(1)" in text
        assert "<script>alert" not in text
        assert text.count("<script") == 1  # the page's own


def test_a_sweeps_report_shows_what_a_stranger_wrote_as_text(tmp_path):
    jobs = [({"data.path": EVIL}, runs.finished(2.0)), ({"data.path": EVIL + "2"}, {"rows": [], "state": "failed", "error": EVIL})]
    sweep = runs.make_sweep(tmp_path / "sweep", jobs)
    assert main(["report", str(sweep)]) == 0
    text = (sweep / "sweep.html").read_text()
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert text.count("<script") == 1


def test_a_formula_in_a_strangers_text_does_not_cost_the_picture(tmp_path):
    """matplotlib reads $...$ as one."""
    jobs = [({"data.path": "$\\nonsense{$"}, runs.finished(2.0)), ({"data.path": "b"}, runs.finished(3.0))]
    sweep = runs.make_sweep(tmp_path / "$\\nonsense{$", jobs)
    assert main(["report", str(sweep)]) == 0
    assert loss_png(sweep / "0_job").stat().st_size > 1000


def test_warnings_before_a_run_has_a_log_do_not_steer_a_terminal_either():
    code = "import logging; from xtuner_hydra import __main__; __main__._log_to_stderr(); logging.getLogger('xtuner_hydra').warning('\\x1b[31m')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "\\x1b[31m\n"


def test_terminals_are_not_steered(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    escape = "\x1b]0;owned\x07\x1b[2J\x9b31m"
    run = runs.make_run(tmp_path / "run", [runs.step(1, 2.0)], **everywhere(escape))
    damaged = runs.make_run(tmp_path / "damaged", [])
    (damaged / "config.yaml").write_text("\x1b[2J: [")
    (run / "environment.json").write_text(json.dumps({**runs.ENVIRONMENT, "git": {"commit": escape, "diff": escape}}))
    other = run_dirs.make_run(tmp_path / "other")
    for verb in (["runs", "."], ["diff", str(run), str(other)], ["report", "."], ["report", str(damaged)], ["rerun", str(damaged)]):
        main(verb)
        told = capsys.readouterr()
        assert not [one for one in told.out + told.err if one in "\x1b\x07\x9b"], verb


def test_a_models_answer_does_not_steer_the_terminal(capsys):
    from xtuner_hydra.tools.chat import _say

    said = []
    _say(iter(["one\ttwo\n", "\x1b", "[2J", "\x1b]52;c;ZXZpbA==\x07", "three"]), said)
    assert capsys.readouterr().out == "one\ttwo\n\\x1b[2J\\x1b]52;c;ZXZpbA==\\x07three\n"
    assert "".join(said) == "one\ttwo\n\x1b[2J\x1b]52;c;ZXZpbA==\x07three"  # the conversation goes on with what was said


def test_no_verb_that_reads_a_run_imports_what_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_format.py").write_text("raise SystemExit('ran')")
    run = runs.make_run(tmp_path / "run", [runs.step(1, 2.0)], data__format="evil_format:read", data__eval_path="x.jsonl")
    for verb in (["report", "run"], ["runs", "."], ["diff", "run", "run"]):
        assert main(verb) == 0
    for verb in (["chat", "run", "-p", "hi"], ["export", "run", "--to", "to"]):
        assert main(verb) == 2  # it has no weights
    assert "evil_format" not in sys.modules
    assert load_run(run).config.data.format == "evil_format:read"
