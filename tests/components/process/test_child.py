"""A step's process: fresh or forked it does the same, whatever ends it is told, it keeps its limits, and never outlives its caller."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import stand_in

from silotune.components.errors import FederationError, UnreachableError
from silotune.components.process import child, ending

STEP = """
import ctypes, os, pathlib, resource, signal, subprocess, sys, time
from silotune.components.process import progress
from silotune.components.errors import FederationError, UnreachableError
from silotune.components.process.progress import Pulse

def tell_pids(file, *more):
    scratch = pathlib.Path(file + ".part")
    scratch.write_text(" ".join(str(pid) for pid in (os.getpid(), *more)))
    scratch.replace(file)

def work(*arguments):
    print("working", flush=True)
    what = arguments[0]
    if what == "echo":
        return " ".join(arguments[1:])
    if what == "refuse":
        raise FederationError("the file is wrong", "bad file")
    if what == "crash":
        raise ZeroDivisionError("secret record text")
    if what == "kill":
        os.kill(os.getpid(), int(arguments[1]))
    if what == "exit":
        sys.exit(int(arguments[1]))
    if what == "leave":
        os._exit(int(arguments[1]))
    if what == "full":
        with open("/dev/full", "w") as f:
            f.write("x")
    if what == "write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        pathlib.Path(arguments[1]).write_bytes(bytes(2000))
    if what == "memory":
        held = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**27,) * 2)
        return str(len(bytearray(2**30)))
    if what == "raise":
        raise {"runtime": RuntimeError, "os": OSError, "value": ValueError}[arguments[1]](arguments[2])
    if what == "eat":
        return str(len(bytes([1]) * int(arguments[1])))
    if what == "hang":
        pulse = Pulse(None, "probe", 1)
        for step in range(int(arguments[2])):
            time.sleep(progress.INTERVAL)
            pulse(step + 1, 50, 1.0)
        tell_pids(arguments[1])
        {
            "sleep": lambda: time.sleep(60),
            "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "deaf": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)), time.sleep(60)),
            "in C": lambda: ctypes.PyDLL(None).sleep(60),  # holds the interpreter: no Python thread can run
        }[arguments[3]]()
    if what == "slow":
        for step in range(int(arguments[1])):
            time.sleep(0.1)
            progress.beat("loading")
        return "done"
    if what == "sleep":
        tell_pids(arguments[1])
        time.sleep(60)
    if what == "family":
        daughter = subprocess.Popen(["sleep", "60"])
        son = os.fork()
        if not son:
            time.sleep(60)
        tell_pids(arguments[1], daughter.pid, son)
        if arguments[2] == "return":
            return "done"
        if arguments[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if what == "told":
        return os.environ["SILOTUNE_DEADLINE"]
    if what == "environment":
        return os.environ["TOLD"] + " " + os.getcwd()
"""


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    stand_in(STEP, tmp_path, monkeypatch)
    return "probe"


@pytest.fixture(params=["fresh", "warm"])
def way(request: pytest.FixtureRequest, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to get a child."""
    if request.param == "fresh":
        monkeypatch.delenv(child.WARM_VARIABLE, raising=False)
        yield "fresh"
        return
    with _warm(monkeypatch) as parent:
        yield "warm"
        assert parent.stdin
        parent.stdin.close()
        assert parent.wait(timeout=10) == 0


@contextlib.contextmanager
def _warm(
    monkeypatch: pytest.MonkeyPatch, preprocess: tuple[str, ...] = (), packages: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A warm parent that imports these only."""
    with tempfile.TemporaryDirectory(prefix="silotune-test-") as folder:
        code = "import sys; from silotune.components.process import warm_parent as w; "
        code += f"w.PREPROCESS, w.PACKAGES = {preprocess!r}, {packages!r}; w.serve(sys.argv[1], 0)"
        parent = subprocess.Popen([sys.executable, "-c", code, f"{folder}/warm"], stdin=subprocess.PIPE)
        _wait_for(Path(folder) / "warm")
        monkeypatch.setenv(child.WARM_VARIABLE, f"{folder}/warm")
        try:
            yield parent
        finally:
            parent.kill()
            parent.wait()


def test_it_returns_what_the_step_returns(way: str) -> None:
    assert child.call("probe", "echo", "a", "b c") == "a b c"


def test_it_has_the_callers_environment_and_folder(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", "hello")
    monkeypatch.chdir(tmp_path)
    assert child.call("probe", "environment") == f"hello {tmp_path}"


def test_errors_keep_their_kind_message_and_reason(way: str) -> None:
    with pytest.raises(FederationError, match="the file is wrong") as caught:
        child.call("probe", "refuse")
    assert caught.value.reason == "bad file"


def test_what_is_unforeseen_stays_in_the_log(way: str, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "probe.log"
    with pytest.raises(child.SilotuneError, match="unexpected ZeroDivisionError") as caught:
        child.call("probe", "crash", log=log)
    assert "secret" not in str(caught.value)
    assert "secret record text" in log.read_text()
    assert log.read_text().startswith("working")


def test_a_full_disk_has_its_own_reason(way: str) -> None:
    with pytest.raises(child.SilotuneError, match="No space left") as caught:
        child.call("probe", "full")
    assert (caught.value.reason, caught.value.exit_code) == ("disk full", 5)


def test_a_killed_child_is_an_error_that_says_so(way: str) -> None:
    with pytest.raises(child.ChildDied, match="killed by signal 9") as caught:
        child.call("probe", "kill", "9")
    assert caught.value.reason == "killed by signal 9"


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (("kill", str(int(signal.SIGABRT))), "killed by signal 6"),
        (("exit", "3"), "exit code 3"),
        (("leave", "7"), "exit code 7"),
        (("leave", "0"), "exit code 0"),
    ],
)
def test_an_end_without_a_result_says_how(way: str, what: tuple[str, ...], reason: str) -> None:
    with pytest.raises(child.ChildDied) as caught:
        child.call("probe", *what)
    assert (caught.value.reason, caught.value.exit_code) == (reason, 1)


def test_a_file_that_finds_no_room_is_a_full_disk(way: str, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError) as caught:
        child.call("probe", "write", str(tmp_path / "file"))
    assert caught.value.reason == "disk full"


def test_memory_that_cannot_be_had_has_its_own_reason(way: str) -> None:
    with pytest.raises(child.SilotuneError, match="smaller batch") as caught:
        child.call("probe", "memory")
    assert (caught.value.reason, caught.value.exit_code) == ("out of memory", 1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk full"),
        (ValueError("a record says: we are out of memory"), "unexpected error"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "a local file cannot be used"),
    ],
)
def test_what_libraries_raise_has_the_same_reasons(error: Exception, reason: str) -> None:
    assert ending.told(error)["reason"] == reason


def test_a_child_that_the_kernel_kills_for_memory_is_out_of_memory(small_group: int, way: str) -> None:
    with pytest.raises(child.ChildDied) as caught:
        child.call("probe", "eat", str(small_group + 2**28))
    assert caught.value.reason == "out of memory"


@pytest.fixture
def small_group() -> Iterator[int]:
    """This process, and what it starts, is in a control group with room for so many bytes; at the end it is back where it was."""
    paths = {kind: path for _, kind, path in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())}
    first = "memory" in paths  # version 1 of control groups
    root = Path("/sys/fs/cgroup/memory" if first else "/sys/fs/cgroup")
    old, group = root / paths["memory" if first else ""].strip("/"), root / f"silotune-test-{os.getpid()}"
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    limit = resident + 2**28  # what is resident now may count, or may stay with the old group
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("no right to make a control group with a memory limit")
    yield limit
    (old / "cgroup.procs").write_text(str(os.getpid()))
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def test_the_deadline_kills_in_time_whatever_the_child_does(way: str, tmp_path: Path, stuck: str) -> None:
    pids = tmp_path / "pids"
    began = time.monotonic()
    with pytest.raises(child.ChildLate) as caught:
        child.call("probe", "hang", str(pids), "0", stuck, deadline=1.0)
    assert 1.0 <= time.monotonic() - began < 2.5
    assert caught.value.reason == "late"
    assert _gone(pids)


@pytest.mark.parametrize("stuck", ["sleep", "stop"])
def test_a_child_that_is_silent_is_hung_and_killed(way: str, tmp_path: Path, stuck: str) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(child.ChildHung) as caught:
        child.call("probe", "hang", str(pids), "2", stuck, stall=1.0)
    assert caught.value.reason == "hung at step 2 of 50"
    assert _gone(pids)


@pytest.fixture(params=["sleep", "stop", "deaf", "in C"])
def stuck(request: pytest.FixtureRequest) -> str:
    """Ways to be stuck."""
    return str(request.param)


def test_a_child_that_never_beat_is_hung_before_any_step(way: str, tmp_path: Path) -> None:
    old = tmp_path / "heartbeat.json"
    old.write_text(json.dumps({"box": "probe", "round": 1, "step": 9, "steps": 10, "loss": 1.0, "at": time.time()}))
    with pytest.raises(child.ChildHung) as caught:
        child.call("probe", "sleep", str(tmp_path / "pids"), stall=1.0, heartbeat=old)
    assert caught.value.reason == "hung", "an old heartbeat counted"
    assert _gone(tmp_path / "pids")


def test_a_slow_child_that_beats_is_left_to_work(way: str) -> None:
    assert child.call("probe", "slow", "15", stall=1.0, deadline=60) == "done"


def test_a_child_knows_its_deadline(way: str) -> None:
    assert float(child.call("probe", "told", deadline=100)) == pytest.approx(time.time() + 100, abs=5)


@pytest.mark.parametrize("end", ["return", "die", "hang"])
def test_what_a_child_has_started_ends_with_it(way: str, tmp_path: Path, end: str) -> None:
    pids = tmp_path / "pids"
    with contextlib.suppress(child.ChildDied, child.ChildLate):
        assert child.call("probe", "family", str(pids), end, deadline=1.0 if end == "hang" else None) == "done"
    assert len(pids.read_text().split()) == 3
    assert _gone(pids)


def test_a_warm_parent_that_is_gone_is_done_without(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(child.WARM_VARIABLE, str(tmp_path / "none"))
    assert child.call("probe", "echo", "a") == "a"


def test_preprocess_is_served_while_the_warm_parent_still_imports(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)\n"
    (tmp_path / "site" / "early.py").write_text(waits.format(str(tmp_path / "asked")))
    (tmp_path / "site" / "tardy.py").write_text(waits.format(str(tmp_path / "served")))
    with _warm(monkeypatch, ("early",), ("early", "tardy")), concurrent.futures.ThreadPoolExecutor() as pool:
        with pytest.raises(child.ChildLate):  # although the parent is busy
            child.call("probe", "echo", deadline=0.2)
        other = pool.submit(child.call, "probe", "echo", "all is imported")
        served = pool.submit(child.call, "preprocess", str(tmp_path / "none.yaml"), "north")
        time.sleep(0.5)
        (tmp_path / "asked").touch()
        with pytest.raises(FederationError, match=r"none\.yaml"):
            served.result(timeout=20)
        assert not other.done(), "the other box did not wait for what it needs"
        (tmp_path / "served").touch()
        assert other.result(timeout=20) == "all is imported"


def test_an_interrupted_caller_leaves_nothing_behind(way: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"from silotune.components.process import child; child.call('probe', 'family', {str(pids)!r}, 'hang')"
    caller = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    _wait_for(pids)
    caller.send_signal(signal.SIGINT)
    caller.wait(timeout=10)
    assert _gone(pids)


@pytest.mark.parametrize("stuck", ["sleep", "stop", "in C"])
def test_an_orphan_is_ended_whatever_it_does(way: str, tmp_path: Path, stuck: str) -> None:
    pids = tmp_path / "pids"
    code = f"from silotune.components.process import child; child.call('probe', 'hang', {str(pids)!r}, '0', {stuck!r})"
    caller = subprocess.Popen([sys.executable, "-c", code])
    _wait_for(pids)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert _gone(pids), "the child outlived its caller"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stuck_child_ends_with_the_warm_parent(step: str, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with _warm(monkeypatch) as parent, concurrent.futures.ThreadPoolExecutor() as pool:
        called = pool.submit(child.call, "probe", "hang", str(tmp_path / "pids"), "0", "in C")
        _wait_for(tmp_path / "pids")
        parent.send_signal(number)
        with pytest.raises(child.ChildDied, match="killed by signal 9"):
            called.result(timeout=10)
        assert _gone(tmp_path / "pids")


def test_what_belongs_to_a_run_ends_with_it(step: str, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({str(tmp_path / 'alive.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout
    holder.stdout.readline()
    pids = tmp_path / "pids"
    code = f"from silotune.components.process import child; child.coordinate('probe', 'sleep', {str(pids)!r})"
    task = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, child.RUN_VARIABLE: str(tmp_path)})
    _wait_for(pids)
    holder.kill()
    holder.wait()
    assert task.wait(timeout=10) == -signal.SIGKILL
    assert _gone(pids)
    assert json.loads((tmp_path / "events.jsonl").read_text())["what"] == "started"


def _wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def _gone(pids: Path) -> bool:
    """Whether the processes that a file lists have ended, or do so at once; zombies have."""
    left = {int(pid) for pid in pids.read_text().split()}
    for _ in range(40):
        left = {pid for pid in left if _alive(pid)}
        if not left:
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
