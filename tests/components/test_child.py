"""A step's process: fresh or forked it does the same, whatever ends it is told, and it never outlives its caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from silotune.components import child
from silotune.components.errors import FederationError

STEP = """
import os, signal, sys, time
from silotune.components.errors import FederationError, UnreachableError

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
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "full":
        with open("/dev/full", "w") as f:
            f.write("x")
    if what == "sleep":
        with open(arguments[1], "w") as f:
            f.write(str(os.getpid()))
        time.sleep(60)
    if what == "environment":
        return os.environ["TOLD"] + " " + os.getcwd()
"""


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A step module that stands beside the real ones, for this test only: silotune.components.probe.step."""
    import silotune.components

    package = tmp_path / "parts" / "probe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "step.py").write_text(STEP)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import silotune.components\nsilotune.components.__path__ = [*silotune.components.__path__, {str(tmp_path / 'parts')!r}]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    assert silotune.components
    return "probe"


@pytest.fixture(params=["fresh", "warm"])
def way(request: pytest.FixtureRequest, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to get a child."""
    if request.param == "fresh":
        monkeypatch.delenv(child.WARM_VARIABLE, raising=False)
        yield "fresh"
        return
    address = f"/tmp/silotune-test-{os.getpid()}"
    code = "import sys; from silotune.components import warm_parent as w; w.PACKAGES = (); w.serve(sys.argv[1], 0)"
    parent = subprocess.Popen([sys.executable, "-c", code, address], stdin=subprocess.PIPE)
    while not os.path.exists(address):
        time.sleep(0.01)
    monkeypatch.setenv(child.WARM_VARIABLE, address)
    yield "warm"
    assert parent.stdin
    parent.stdin.close()
    assert parent.wait(timeout=10) == 0
    os.unlink(address)


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
    with pytest.raises(child.ChildDied, match="killed by signal 9"):
        child.call("probe", "kill")


def test_an_orphan_ends_by_itself(way: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"from silotune.components import child; child.call('probe', 'sleep', {str(pid_file)!r})"
    caller = subprocess.Popen([sys.executable, "-c", code])
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.02)
    pid = int(pid_file.read_text())
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert _ends(pid), "the child outlived its caller"


def test_what_belongs_to_a_run_ends_with_it(step: str, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open({str(tmp_path / 'alive.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout
    holder.stdout.readline()
    pid_file = tmp_path / "pid"
    code = f"from silotune.components import child; child.coordinate('probe', 'sleep', {str(pid_file)!r})"
    task = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, child.RUN_VARIABLE: str(tmp_path)})
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.02)
    holder.kill()
    holder.wait()
    assert task.wait(timeout=10) == -signal.SIGKILL
    assert _ends(int(pid_file.read_text()))
    assert json.loads((tmp_path / "events.jsonl").read_text())["what"] == "started"


def _ends(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False
