"""What is renamed into place is on the disk before, and its name after: seen from outside, in the system calls of a real run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CALL = re.compile(r"(fsync|fdatasync|rename|renameat|renameat2)\((.*)\)\s+= 0$")


@pytest.fixture
def strace(tmp_path):
    """The command that notes system calls, or a skipped test."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    noted = ["-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "--seccomp-bpf"]  # the others at full speed
    command = [program, "-f", *noted, "-y", "-qq", "-s", "4096", "-o", tmp_path / "calls"]
    probe = subprocess.run([*command, "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here (ptrace): {probe.stderr.strip()}")
    return command


def calls(path):
    """(call, its paths) in the order in which they ended; one that another interrupted is put together."""
    begun = {}
    for line in path.read_text().splitlines():
        process, text = line.split(maxsplit=1)
        if text.endswith("<unfinished ...>"):
            begun[process] = text.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>\s*", text):
            text = begun.pop(process) + text[resumed.end() :]
        if match := CALL.match(text):
            name, arguments = match.groups()
            paths = re.findall(r"^\d+<(.*)>$", arguments) if "sync" in name else re.findall(r'"([^"]*)"', arguments)
            yield name, [Path(one) for one in paths]


def test_what_gets_its_final_name_is_on_the_disk(cli, tmp_path, strace):
    """Checkpoints (saved behind training), exports, and files that are replaced."""
    run = tmp_path / "run"
    arguments = ["debug=fast", "tracking.wandb.enabled=false", "checkpoint.interval=1", "checkpoint.hf_interval=1", f"hydra.run.dir={run}"]
    keep = ["checkpoint.keep=9", "checkpoint.hf_keep=9", "checkpoint.asynchronous=true"]
    command = [*strace, *cli._command([*arguments, *keep], "xtuner_hydra")]
    done = subprocess.run(command, cwd=tmp_path, env=cli.environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr

    synced, directories, replaced = set(), [], []
    waiting = {}  # directory -> what was renamed in it since it was last flushed
    for name, paths in calls(tmp_path / "calls"):
        if "sync" in name:
            synced |= set(paths)
            waiting.pop(paths[0], None)
            continue
        source, target = paths
        if not target.is_relative_to(run) or not (is_committed(target) or target.suffix in (".json", ".yaml")):
            continue
        assert target.parent not in waiting, f"{waiting.get(target.parent)} was not flushed before {target} came"
        if is_committed(target):
            inside = [source / path.relative_to(target) for path in target.rglob("*")]
            assert [path for path in [source, *inside] if path not in synced] == []
            directories.append(str(target.relative_to(run)))
        else:
            assert source in synced
            replaced.append(target.name)
        waiting[target.parent] = target
        synced = {path for path in synced if not path.is_relative_to(source)}  # the next of that name starts anew
    assert waiting == {}
    assert sorted(directories) == ["checkpoints/step-1", "checkpoints/step-2", "hf/step-1", "hf/step-2"]
    assert {"status.json", "config.yaml", "environment.json", "manifest.json", "state.json", "tensors.json"} <= set(replaced)


def is_committed(path):
    return re.fullmatch(r"step-\d+", path.name) is not None
