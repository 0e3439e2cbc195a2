"""Imports point one way (CONTRIBUTING.md), heavy packages come where they are used, and no file is left over."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import xtuner_hydra
from xtuner_hydra.__main__ import VERBS

PACKAGE = Path(xtuner_hydra.__file__).parent
MODULES = {
    ".".join(("xtuner_hydra", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
PARTS = {name.split(".")[1] for name in MODULES if "." in name}


def imported(path):
    """Dotted names that a module imports, wherever in it, each `from a import b` as a.b too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_are_absolute():
    """Or `imported` would not see them."""
    for name, path in MODULES.items():
        relative = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, name


def parts_used_by(part):
    """Top-level parts of the package that `part` (a folder or a file) imports, itself apart."""
    names = set()
    for name, path in MODULES.items():
        if name.split(".")[1:2] == [part]:
            names |= {one.split(".")[1] for one in imported(path) if one.startswith("xtuner_hydra.")}
    return (names & PARTS) - {part}


@pytest.mark.parametrize(
    ("part", "may_use"),
    [
        ("errors", set()),
        ("safe_text", set()),
        ("files", set()),
        ("machine", set()),
        ("signals", {"errors", "machine"}),
        ("config", {"errors"}),
        ("data", {"config", "errors", "files", "machine", "safe_text"}),
        ("pointwise", set()),
        ("loss", {"pointwise"}),
        ("stopping", {"errors", "signals"}),
        ("model", {"config", "errors", "loss", "pointwise"}),
        ("optim", {"config"}),
        ("parallel", {"config", "errors", "files", "machine", "model", "signals"}),
        ("engine", {"data", "errors", "model", "parallel"}),
        ("checkpoint", {"config", "data", "errors", "files", "model", "parallel"}),
        ("tracking", {"config", "errors", "files", "machine", "safe_text"}),
        ("results", {"config", "errors", "files", "run_dir", "safe_text", "tracking"}),
        ("words", set()),
        ("reports", {"config", "errors", "files", "results", "run_dir", "safe_text", "tracking", "words"}),
        ("metrics", {"checkpoint", "config", "data", "engine", "model", "parallel", "tracking"}),
        ("trained", {"checkpoint", "config", "errors", "machine", "model", "parallel", "results"}),
        (
            "trainer",
            {"checkpoint", "config", "data", "engine", "errors", "files", "metrics", "model", "optim", "parallel", "stopping", "tracking"},
        ),
        (
            "sweeps",
            {
                *("app", "config", "cost", "errors", "files", "launch", "parallel", "ranks", "reports", "results", "run_dir", "safe_text"),
                *("checkpoint", "machine", "signals", "tracking", "worker", "words"),
            },
        ),
        ("cost", {"config", "model", "optim"}),
        ("build", {"checkpoint", "config", "engine", "model", "optim", "parallel"}),
        ("ranks", {"config", "errors", "garbage", "parallel", "results", "run_dir", "safe_text", "signals", "streams", "worker"}),
        ("compose", {"config", "errors", "model"}),
        ("app", {"compose", "config", "errors", "safe_text"}),
        ("recompose", {"app", "compose", "config"}),
        ("forecast", {"config", "cost", "launch", "optim", "room", "sweeps", "words"}),
        ("room", {"config", "cost", "errors", "machine", "words"}),
        ("run_dir", {"config", "errors", "files", "safe_text"}),
        (
            "launch",
            {
                *("checkpoint", "config", "cost", "data", "errors", "files", "machine", "model", "parallel", "ranks"),
                *("results", "room", "run_dir", "stopping", "tracking"),
            },
        ),
        (
            "worker",
            {
                *("build", "checkpoint", "config", "data", "errors", "files", "garbage", "machine", "metrics", "optim", "parallel"),
                *("pointwise", "reports", "results", "run_dir", "safe_text", "stopping", "tracking", "trainer", "words"),
            },
        ),
    ],
)
def test_imports_point_one_way(part, may_use):
    assert parts_used_by(part) <= may_use


def test_only_the_app_and_sweeps_import_hydra():
    users = {name for name, path in MODULES.items() if any(one.split(".")[0] == "hydra" for one in imported(path))}
    assert {name.split(".")[1] for name in users} <= {"app", "compose", "sweeps"}


def test_only_parallel_attention_experts_and_the_doctor_name_a_kind_of_device():
    users = {name for name, path in MODULES.items() if "cuda" in path.read_text()}
    model = {"xtuner_hydra.model.attention", "xtuner_hydra.model.experts"}
    allowed = model | {"xtuner_hydra.tools.doctor", "xtuner_hydra.config.schema", "xtuner_hydra.checkpoint.state"}
    assert {name for name in users if not name.startswith("xtuner_hydra.parallel.")} <= allowed  # state: the GPU's random generator


def test_every_module_is_imported_by_another():
    used = set().union(*(imported(path) for path in MODULES.values()))
    assert {name for name in MODULES if name not in used and not any(one.startswith(name + ".") for one in used)} <= {
        "xtuner_hydra.__main__",
        "xtuner_hydra.examples",
        "xtuner_hydra.tools",
        *(f"xtuner_hydra.tools.{verb}" for verb in VERBS),
    }
    assert {f"xtuner_hydra.tools.{verb}" for verb in VERBS} <= MODULES.keys()


def loaded_by(*command):
    code = "import atexit, sys, runpy; sys.argv = ['xtuner_hydra', *sys.argv[1:]]\n"
    code += "atexit.register(lambda: print('LOADED', *sorted(name for name in sys.modules if '.' not in name)))\n"
    code += "runpy.run_module('xtuner_hydra', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60)
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def test_importing_the_package_costs_nothing():
    code = "import sys; before = set(sys.modules); import xtuner_hydra; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= {"xtuner_hydra", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "command", [["--help"], ["--cfg", "job"], ["optimizer.lrr=1"], ["plan", "optimizer.lrr=1"], ["data", "optimizer.lr=-1"]]
)
def test_help_and_refusals_need_no_torch(command):
    assert not loaded_by(*command) & {"torch", "transformers", "wandb", "matplotlib", "tensorboard"}
