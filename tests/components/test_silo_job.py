"""A silo's failure is a value: whatever its step does, the task ends well with a status, in time, and the round has a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_in import stand_in

from silotune.components import silo_job
from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.process import child
from silotune.components.process.progress import HEARTBEAT_VARIABLE, INTERVAL, Heartbeat, Pulse, beat, read_heartbeat, read_heartbeats
from silotune.components.protocol import Report, Turn
from silotune.components.rounds import Rounds
from silotune.components.silo_job import parse_status, supervise

STEP = """
import os, pathlib, resource, signal, subprocess, sys, time
from silotune.components import silo_job
from silotune.components.errors import RefusedError, UnreachableError
from silotune.components.federation import Federation
from silotune.components.process.progress import Pulse

def work(file, silo, what, *more):
    federation = Federation.load(file)
    home = silo_job.silo_home(federation, federation.silo(silo))
    pulse = Pulse(home, "probe", 1)
    if what == "ok":
        return silo + " ok"
    if what == "crash":
        raise KeyError("secret record text")
    if what == "refuse":
        raise RefusedError("the plan is not mine", "not a participant")
    if what == "unreachable":
        raise UnreachableError("no store")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        sys.exit(3)
    if what == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
        (home / "large").write_bytes(bytes(2 * 10**5))
    if what == "memory":
        raise MemoryError
    if what == "hang":
        pulse(12, 50, 1.0)
        time.sleep(60)
    if what == "slow":
        while True:
            pulse.beat("loading")
            time.sleep(0.1)
    if what == "soft":
        while silo_job.time_left() > 1.5:
            time.sleep(0.05)
        return silo + " ok: stopped softly"
    if what == "hold":
        with silo_job.one_at_a_time(home, pulse):
            with (home / "order").open("a") as order:
                order.write(more[0] + " in\\n")
            end = time.monotonic() + float(more[1])
            while time.monotonic() < end:
                time.sleep(0.1)
                if more[0] != "stuck":
                    pulse.beat("working")
            with (home / "order").open("a") as order:
                order.write(more[0] + " out\\n")
        return silo + " ok"
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a federation file of one silo, ``north``, and puts silotune.components.probe.step beside the real steps."""
    stand_in(STEP, tmp_path, monkeypatch)
    monkeypatch.delenv(child.WARM_VARIABLE, raising=False)

    def write(**rounds: Any) -> str:
        silo = {"id": "north", "train": "north.jsonl", "storage": "private"}
        content = {"name": "hand", "model": {"base": "base"}, "silos": [silo], "rounds": rounds, "security": {"signing": False}}
        (tmp_path / "federation.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "federation.yaml")

    return write


TURN = Turn.parse("round:1 attempt:1")


def report(file: str) -> Report:
    return Rounds.of(Federation.load(file)).reports(1, 1)["north"]


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("crash", "north failed: unexpected error"),
        ("refuse", "north refused: not a participant"),
        ("unreachable", "north failed: store unreachable or full"),
        ("kill", "north failed: killed by signal 9"),
        ("exit", "north failed: exit code 3"),
        ("disk", "north failed: disk full"),
        ("memory", "north failed: out of memory"),
    ],
)
def test_a_failure_is_a_status_and_a_report(make: Any, what: str, status: str) -> None:
    file = make()
    assert supervise("probe", file, "north", what, turn=TURN) == status
    written = report(file)
    assert f"north {written.text}" == status
    assert "secret" not in written.encode().decode()


def test_a_silo_that_is_well_says_so_itself(make: Any) -> None:
    file = make()
    assert supervise("probe", file, "north", "ok", turn=TURN) == "north ok"
    assert Rounds.of(Federation.load(file)).reports(1, 1) == {}


def test_past_the_deadline_a_silo_is_late_however_lively(make: Any) -> None:
    file = make(deadline="2s", stall="60s")
    began = time.monotonic()
    assert supervise("probe", file, "north", "slow", turn=TURN) == "north late"
    assert 2 <= time.monotonic() - began < 4
    assert parse_status("north late") == ("north", "late", "")
    assert report(file).text == "late: past the deadline"


def test_a_silo_that_is_silent_fails_at_the_step_it_reached(make: Any) -> None:
    file = make(stall="5s")
    assert supervise("probe", file, "north", "hang", turn=TURN) == "north failed: hung at step 12 of 50"
    assert report(file).reason == "hung at step 12 of 50"


def test_a_step_can_stop_softly_before_its_deadline(make: Any) -> None:
    assert supervise("probe", make(deadline="3s"), "north", "soft") == "north ok: stopped softly"


def test_time_left_is_none_without_a_deadline_and_never_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(child.DEADLINE_VARIABLE, raising=False)
    assert silo_job.time_left() is None
    monkeypatch.setenv(child.DEADLINE_VARIABLE, str(time.time() + 50))
    assert silo_job.time_left() == pytest.approx(50, abs=1)
    monkeypatch.setenv(child.DEADLINE_VARIABLE, str(time.time() - 50))
    assert silo_job.time_left() == 0


def test_storage_that_cannot_be_made_is_a_failure_like_any(make: Any, tmp_path: Path) -> None:
    file = make()
    (tmp_path / "private").write_text("a file where the folder belongs")
    assert supervise("probe", file, "north", "ok", turn=TURN) == "north failed: a local file cannot be used"
    assert report(file).status == "failed"


def test_a_log_that_cannot_be_written_is_a_failure_like_any(make: Any, tmp_path: Path) -> None:
    file = make()
    (tmp_path / "private" / "hand" / "logs" / "probe.log").mkdir(parents=True)
    assert supervise("probe", file, "north", "ok", turn=TURN) == "north failed: a local file cannot be used"


def test_a_store_that_takes_no_report_still_leaves_the_status(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make()
    (tmp_path / ".silotune").write_text("a file where the store belongs")
    assert supervise("probe", file, "north", "kill", turn=TURN) == "north failed: killed by signal 9"


def test_a_federation_file_that_cannot_be_read_is_an_error(make: Any, tmp_path: Path) -> None:
    with pytest.raises(FederationError):
        supervise("probe", str(tmp_path / "none.yaml"), "north", "ok")
    with pytest.raises(FederationError, match="'south' is not in federation"):
        supervise("probe", make(), "south", "ok")


@pytest.mark.parametrize("what", ["crash", "kill", "slow"])
def test_the_task_of_a_failed_silo_exits_well(make: Any, what: str) -> None:
    code = f"from silotune.components.silo_job import supervise; supervise('probe', {make(deadline='1s')!r}, 'north', {what!r})"
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == 0


def holding(file: str, name: str, seconds: float) -> subprocess.Popen[str]:
    code = (
        f"from silotune.components.silo_job import supervise; print(supervise('probe', {file!r}, 'north', 'hold', {name!r}, '{seconds}'))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, text: str) -> None:
    for _ in range(1000):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never said {text!r}")


def test_two_runs_work_on_a_silo_one_after_the_other(make: Any, tmp_path: Path) -> None:
    file = make(stall="5s")  # the second waits longer than that, and is not taken for hung
    order = tmp_path / "private" / "hand" / "order"
    first = holding(file, "first", 6)
    wait_for(order, "first in")
    second = holding(file, "second", 0)
    for process in (first, second):
        assert process.communicate(timeout=20)[0].splitlines()[-1] == "north ok"
    assert order.read_text().split("\n")[:-1] == ["first in", "first out", "second in", "second out"]


def test_a_waiting_box_hides_no_hang_of_the_one_it_waits_for(make: Any, tmp_path: Path) -> None:
    file = make(stall="5s")
    order = tmp_path / "private" / "hand" / "order"
    stuck = holding(file, "stuck", 60)
    wait_for(order, "stuck in")
    second = holding(file, "second", 0)
    assert "north failed: hung" in stuck.communicate(timeout=20)[0].splitlines()[-1]
    assert second.communicate(timeout=20)[0].splitlines()[-1] == "north ok"
    assert order.read_text().split("\n")[:-1] == ["stuck in", "second in", "second out"]


def test_a_killed_holder_frees_the_folder(make: Any, tmp_path: Path) -> None:
    file = make()
    first = holding(file, "first", 60)
    wait_for(tmp_path / "private" / "hand" / "order", "first in")
    second = holding(file, "second", 0)
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=20)[0].splitlines()[-1] == "north ok"
    first.wait()


def test_heartbeats_count_on_keep_the_step_and_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = tmp_path / "watched.json"
    monkeypatch.setenv(HEARTBEAT_VARIABLE, str(watched))
    pulse = Pulse(tmp_path, "train", 3)
    pulse.beat("loading")
    first = read_heartbeat(watched)
    assert first
    assert (first.phase, first.steps, first.beats) == ("loading", 0, 1)
    assert list(read_heartbeats({"north": tmp_path})) == [], "no step, nothing to show"
    for _ in range(1000):
        pulse.beat("loading")
    assert read_heartbeat(watched) == first
    pulse(50, 50, 1.5)
    time.sleep(INTERVAL)
    beat("sending")
    last = read_heartbeat(watched)
    assert last
    assert (last.phase, last.step, last.steps, last.loss, last.beats) == ("sending", 50, 50, 1.5, 1003)
    assert [b for _, b in read_heartbeats({"north": tmp_path})] == [last]
    time.sleep(INTERVAL)
    pulse.beat("waiting", holder=False)
    waiting = read_heartbeat(watched)
    assert waiting
    assert waiting.phase == "waiting"
    assert [b for _, b in read_heartbeats({"north": tmp_path})] == [last], "the silo's heartbeat is the holder's"


def test_heartbeats_written_before_there_were_phases_are_read(tmp_path: Path) -> None:
    old = {"box": "train", "round": 1, "step": 2, "steps": 8, "loss": 1.0, "at": 5.0}
    (tmp_path / "heartbeat.json").write_text(json.dumps(old))
    assert list(read_heartbeats({"north": tmp_path})) == [("north", Heartbeat(**old))]


def test_a_heartbeat_that_finds_no_room_is_no_trouble(tmp_path: Path) -> None:
    Pulse(tmp_path / "none", "train", 1)(1, 1, 1.0)
    assert not os.listdir(tmp_path)
