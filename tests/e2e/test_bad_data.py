"""Data that is bad, big or cut short, and caches that are built where something goes wrong: the real command line, one clear outcome each."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
from collections import Counter
from itertools import cycle

import pytest
from chats import chat, write_lines
from conftest import QUIET, read_rows, read_status, stop, wait_for

ENORMOUS = 17 << 20  # bytes of a line that is too large
BAD = {
    "JSON": [b"{broken", b'[{"role": "user", "content": "cut sh', b"[1" + b"0" * 5000 + b"]"],
    "UTF-8": [b'[{"role": "user", "content": "\xff"}]', "[Grüße]".encode("latin-1")],
    "conversation": [b"3", b'{"text": "x"}', b'[{"role": "robot", "content": "x"}]', b'[{"role": "assistant", "content": ["x"]}]'],
    "empty": [b"{}", b"[]", b"null", b'""', b'{"messages": []}'],
    "NUL bytes": [b"\0" * 50, json.dumps(chat("x")).encode() + b"\0", json.dumps(chat("a\0b")).encode()],
    "nesting": [b"[" * 2000, b"[" * 2000 + b"]" * 2000, b'{"messages": ' * 2000],
}


def write_damaged(path, lines):
    """1 % of each kind of bad line among good ones; (lines of each kind, good lines). Of the enormous ones, which are of one kind of
    17 MiB, there are three: 1 % of 200,000 would be 34 GB."""
    every = 100
    kinds = {place: kind for place, kind in zip(range(7, every, 11), BAD, strict=False)}
    enormous = [lines // 4, lines // 2, lines - 1]
    variants = {kind: cycle(BAD[kind]) for kind in BAD}
    expected, good = {}, 0
    with path.open("wb") as stream:
        for number in range(1, lines + 1):
            if number in enormous:
                line, kind = b'["' + b"x" * ENORMOUS + b'"]', "too large"
            elif number % every == 0:
                line, kind = b" \t", None  # a blank line is none of them
            elif kind := kinds.get(number % every):
                line = next(variants[kind])
            else:
                line = b'[{"role":"user","content":"q%d"},{"role":"assistant","content":"%s"}]' % (number, b"a" * (number % 40 + 1))
                good += 1
            stream.write(line + b"\n")
            if kind:
                expected[number] = kind
    return expected, good


@pytest.mark.parametrize("lines", [2000, pytest.param(200_000, marks=pytest.mark.faults)])
def test_the_good_lines_are_trained_on_and_the_bad_ones_counted_named_and_kept(cli, lines):
    expected, good = write_damaged(cli.directory / "bad.jsonl", lines)
    args = ("debug=fast", "data.path=bad.jsonl", *QUIET, "tracking.jsonl=true", "hydra.run.dir=run")
    done = cli(*args, "data.bad_lines=skip")
    run = cli.directory / "run"
    assert (done.code, read_status(run)["state"], len(read_rows(run))) == (0, "completed", 2), done.text
    described = json.loads((run / "data.json").read_text())["train"]
    assert described["bad_lines"] == Counter(expected.values())
    assert {described["bad_lines"][kind] for kind in BAD} == {lines // 100}
    assert described["samples"] == good
    listed = [json.loads(line) for line in (run / "bad_lines.jsonl").read_text().splitlines()]
    assert {line["line"]: line["kind"] for line in listed} == expected
    assert [line["line"] for line in listed] == sorted(expected)
    assert {line["file"] for line in listed} == {str(cli.directory / "bad.jsonl")}
    assert f"{len(expected)} lines skipped" in done.out
    assert all(f"{cli.directory}/bad.jsonl line {number}: " in done.out for number in sorted(expected)[:3])

    shutil.rmtree(run)
    done = cli(*args)
    assert done.code == 2
    assert "Traceback" not in done.text
    assert f"{cli.directory}/bad.jsonl line {min(expected)}: not valid JSON" in done.err
    assert not run.exists()


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gigabyte_of_nul_bytes_that_a_crash_left_is_one_bad_line_and_never_in_memory(cli, workers):
    path = write_lines(cli.directory / "hole.jsonl", [chat("x")] * 10)
    with path.open("ab") as stream:
        stream.truncate(2 << 30)
    args = ("data", "debug=fast", "data.path=hole.jsonl", "data.eval_path=null", "data.bad_lines=skip", f"data.num_workers={workers}")
    process = cli.start_fresh(*args)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = (cli.directory / "output").read_text()
    assert (process.returncode, "1 line skipped (1 NUL bytes)" in said) == (0, True), said
    assert used.ru_maxrss < 1 << 20  # KB


SLOW = '''
import os, time
from pathlib import Path

def parse(record):
    """Says which process it is in, and waits until it is told to go on."""
    Path(f"at-work-{os.getpid()}").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return record
'''
PREPARE = ("data", "debug=fast", "data.path=chats.jsonl", "data.eval_path=null", "data.format=slow:parse", "data.cache_dir=cache")


@pytest.fixture
def slow(cli):
    """A command line with data of ten parts, for several processes, that is not tokenised before a file `go` is there."""
    (cli.directory / "slow.py").write_text(SLOW)
    line = json.dumps(chat("x")).encode()
    (cli.directory / "chats.jsonl").write_bytes((line + (b" " * 1023 + b"\n") * 4097) * 10)
    return cli


def at_work(directory):
    return {int(path.name.rpartition("-")[2]) for path in directory.glob("at-work-*")}


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def output(cli):
    return (cli.directory / "output").read_text()


def caches(directory):
    return sorted(path.name for path in (directory / "cache").glob("*")) if (directory / "cache").exists() else []


@pytest.mark.parametrize(
    "name", ["chats.jsonl", pytest.param("chats.jsonl.gz", marks=pytest.mark.faults)]
)  # the latter is sent through pipes
def test_a_process_that_tokenises_and_is_killed_ends_the_run_with_a_message(slow, name):
    (slow.directory / "chats.jsonl.gz").write_bytes(gzip.compress((slow.directory / "chats.jsonl").read_bytes(), compresslevel=0))
    process = slow.start_fresh(*PREPARE, f"data.path={name}", "data.num_workers=2")
    try:
        wait_for(lambda: len(at_work(slow.directory)) == 2, process)
        victim, other = at_work(slow.directory)
        os.kill(victim, signal.SIGKILL)
        assert process.wait(30) == 2
    finally:
        process.poll() is None and process.kill()
    assert "data.num_workers=2: a process that tokenises died" in output(slow)
    assert "Traceback" not in output(slow)
    wait_for(lambda: not alive(other), seconds=10)
    assert not (slow.directory / "cache").exists()


@pytest.mark.faults
def test_a_run_that_is_killed_while_it_builds_a_cache_leaves_no_process_and_the_next_one_builds_it(slow):
    process = slow.start_fresh(*PREPARE, "data.num_workers=2")
    wait_for(lambda: len(at_work(slow.directory)) == 2, process)
    workers = at_work(slow.directory)
    assert stop(process, signal.SIGKILL) == -signal.SIGKILL
    (leftover,) = caches(slow.directory)
    (slow.directory / "go").touch()
    wait_for(lambda: not any(map(alive, workers)), seconds=10)  # each after the part it was at
    done = slow(*PREPARE)
    assert (done.code, "10 samples" in done.out) == (0, True), done.text
    left = [name for name in caches(slow.directory) if name != leftover]
    assert (len(left), left[0].startswith(".")) == (1, False)

    ids = slow.directory / "cache" / left[0] / "ids.bin"  # as a crash of the machine may leave it
    ids.write_bytes(ids.read_bytes()[:-7])
    done = slow(*PREPARE)
    assert (done.code, "is broken (ids.bin has " in done.text, "10 samples" in done.out) == (0, True, True), done.text
    assert sorted(caches(slow.directory)) == sorted([leftover, left[0]])


@pytest.mark.faults
def test_two_runs_that_build_the_same_cache_at_once_both_have_it(slow):
    processes = [slow.start_fresh(*PREPARE, "data.num_workers=0") for _ in range(2)]
    wait_for(lambda: len(at_work(slow.directory)) == 2)
    staged = caches(slow.directory)
    (slow.directory / "go").touch()
    assert [process.wait(60) for process in processes] == [0, 0]
    assert (len(staged), all(name.endswith(".tmp") for name in staged)) == (2, True)
    (cache,) = caches(slow.directory)
    assert not cache.startswith(".")


def limited(cli, *args, size):
    """The command in a process none of whose files may have more than `size` bytes."""
    done = subprocess.run(
        cli._command(args, "xtuner_hydra"),
        cwd=cli.directory,
        env={**cli.environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    return done


DIRECT = ("data", "debug=fast", "data.path=chats.jsonl", "data.eval_path=null", "data.cache_dir=cache/deep")


# nothing but the smallest fits; all but ids.bin does
@pytest.mark.parametrize("size", [pytest.param(2048, marks=pytest.mark.faults), 40_000])
def test_a_cache_that_outgrows_what_a_file_may_have_is_refused_and_nothing_of_it_stays(cli, size):
    write_lines(cli.directory / "chats.jsonl", [chat("x" * 50)] * 400)
    done = limited(cli, *DIRECT, size=size)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"data.cache_dir={cli.directory}/cache/deep: cannot be written (File too large); choose another directory" in done.stderr
    assert not (cli.directory / "cache").exists()
    assert cli(*DIRECT).code == 0


@pytest.mark.faults
@pytest.mark.parametrize("size", ["8k", "64k"])
def test_a_cache_on_a_full_disk_is_refused_and_nothing_of_it_stays(cli, size):
    write_lines(cli.directory / "chats.jsonl", [chat("x" * 50)] * 1000)
    disk = cli.directory / "cache"
    disk.mkdir()
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = ["sh", "-c", f'mount -t tmpfs -o size={size} none "$0" && "$@"; code=$?; ls -A "$0"; exit $code', str(disk)]
    if not shutil.which("unshare") or subprocess.run([*namespace, *mount, "true"], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    done = subprocess.run(
        [*namespace, *mount, *cli._command(DIRECT, "xtuner_hydra")], cwd=cli.directory, env=cli.environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"data.cache_dir={disk}/deep: cannot be written (No space left on device); choose another directory" in done.stderr
    assert done.stdout == ""  # what ls found
