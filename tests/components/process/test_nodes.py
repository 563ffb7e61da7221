"""Several processes on one machine, and several machines, do one silo's training: one update, one report, and an end that all hear of."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components import silo_job
from silotune.components.errors import FederationError, SilotuneError
from silotune.components.federation import Federation
from silotune.components.initialize import step as initialize
from silotune.components.learning.update import read_header
from silotune.components.preprocess import step as preprocess
from silotune.components.process import nodes
from silotune.components.process.nodes import Layout, NodeLost, Table
from silotune.components.process.progress import read_heartbeat
from silotune.components.protocol import Report, Turn
from silotune.components.rounds import Rounds
from silotune.components.train import step as train

SILOS = ("east", "north", "south")
TURN = "round:1 attempt:1"
TRAINING = {"steps": 4, "batch_size": 3, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("PET_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def opened(make_federation: Any) -> Any:
    """Writes a federation file whose round 1 is open."""

    def make(**sections: Any) -> Path:
        file = make_federation(**{"training": TRAINING, **sections})
        assert initialize.work(str(file), *(preprocess.work(str(file), s) for s in SILOS)) == TURN
        return file

    return make


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return int(door.getsockname()[1])


def rounds_of(file: Path) -> Rounds:
    return Rounds.of(Federation.load(file))


def home_of(file: Path, silo: str = "north") -> Path:
    federation = Federation.load(file)
    return silo_job.silo_home(federation, federation.silo(silo))


def of_node(node: int, port: int, limit: int = 60, processes: int = 1, count: int = 2) -> dict[str, str]:
    return {
        "PET_NNODES": str(count), "PET_NPROC_PER_NODE": str(processes), "PET_NODE_RANK": str(node), "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port), "PET_RDZV_CONF": f"timeout={limit}",
    }  # fmt: skip


def start(file: Path, silo: str = "north", **environment: str) -> subprocess.Popen[str]:
    """As a pod runs it."""
    command = [sys.executable, "-m", "silotune.components.silo_job", "train", str(file), silo, TURN]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "TEST_FILE": str(file)} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(job: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
    out, _ = job.communicate(timeout=seconds)
    return job.returncode, out.strip()


def workers_of(file: Path) -> list[int]:
    """The workers that `start` has led to, by their environment, in the order of their pids."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
            if b"silotune.components.train.workers" in words and f"TEST_FILE={file}\0".encode() in environment:
                found.append(int(place.name))
    return sorted(found)


# What the environment says


def test_without_a_word_there_is_one_process() -> None:
    assert Layout.of({}) == Layout()
    assert Layout.of({"JOB_COMPLETION_INDEX": "3", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"}) == Layout()
    assert Layout().size == 1


def test_the_environment_is_read_as_torchrun_does() -> None:
    there = {"PET_NNODES": "2", "PET_MASTER_ADDR": "north-0.north"}
    assert Layout.of(there | {"JOB_COMPLETION_INDEX": "1"}) == Layout(2, 1, 1, "north-0.north", 29500)
    assert Layout.of(there | {"JOB_COMPLETION_INDEX": "1", "PET_NODE_RANK": "0"}).node == 0
    more = there | {"PET_NPROC_PER_NODE": "8", "PET_MASTER_PORT": "1234", "PET_RDZV_CONF": "x=1,timeout=30"}
    assert Layout.of(more) == Layout(2, 8, 0, "north-0.north", 1234, 30)
    assert Layout.of(more).size == 16
    assert Layout.of({"PET_NPROC_PER_NODE": "auto"}).per_node == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PET_NNODES": "1:4"}, r"PET_NNODES: must be a whole number from 1 on, got '1:4'"),
        ({"PET_NPROC_PER_NODE": "0"}, r"PET_NPROC_PER_NODE: must be a whole number from 1 on, got '0'"),
        ({"PET_NNODES": "2"}, r"PET_MASTER_ADDR: is required with PET_NNODES 2"),
        ({"PET_NNODES": "2", "JOB_COMPLETION_INDEX": "2"}, r"JOB_COMPLETION_INDEX: must be below PET_NNODES 2, got 2"),
        ({"PET_RDZV_CONF": "timeout=soon"}, r"PET_RDZV_CONF timeout: must be a whole number from 1 on, got 'soon'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(FederationError, match=message):
        Layout.of(environment)


@pytest.mark.parametrize(("gpus", "asked", "settled"), [(0, 0, 1), (0, 3, 3), (4, 0, 4), (4, 4, 4), (4, 2, 2), (4, 5, None)])
def test_there_is_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch, gpus: int, asked: int, settled: int | None) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if settled:
        assert Layout(per_node=asked).settled().per_node == settled
    else:
        with pytest.raises(FederationError, match=r"PET_NPROC_PER_NODE: must be at most the number of GPUs, got 5, and node 0 sees 4; ask"):
            Layout(per_node=asked).settled()


# The table


def layouts(port: int, limit: float = 20) -> tuple[Layout, Layout]:
    return Layout(2, 1, 0, "127.0.0.1", port, limit), Layout(2, 1, 1, "127.0.0.1", port, limit)


def test_machines_of_different_trainings_do_not_meet(port: int) -> None:
    first, second = layouts(port)
    table = Table.kept(first, {"turn": "1", "processes per node": 2})
    with pytest.raises(FederationError, match="processes per node is 2 there and 1 here; turn is '1' there and '2' here"):
        Table.reached(second, {"turn": "2", "processes per node": 1}, lambda: False)
    with pytest.raises(FederationError, match="node 1 does not fit node 0"):
        table.gather()


def test_a_machine_that_does_not_come_is_named(port: int) -> None:
    first, second = layouts(port, limit=1)
    with pytest.raises(NodeLost, match=r"node 0 of this training cannot be reached at 127.0.0.1:\d+ for 1 s"):
        Table.reached(second, {}, lambda: False)
    with pytest.raises(NodeLost, match="node 1 of this training did not come for 1 s; see whether it was started"):
        Table.kept(first, {}).gather()


def test_a_machine_without_a_sign_of_life_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = layouts(port)
    table = Table.kept(first, {})
    other = Table.reached(second, {}, lambda: False)
    assert other is not None
    assert other.look() is None
    table.gather()
    monkeypatch.setattr(nodes, "SIGN", 0.0)
    monkeypatch.setattr(nodes, "SILENCE", 0.5)
    for _ in range(10):
        time.sleep(0.1)
        other.look()
        assert table.look() is None
    time.sleep(0.6)
    with pytest.raises(NodeLost, match="node 1 of this training gave no sign of life"):
        table.look()


def test_a_port_that_is_taken_is_an_error(port: int) -> None:
    first, _ = layouts(port)
    with socket.create_server(("", port)), pytest.raises(FederationError, match=f"PET_MASTER_PORT: must be free on node 0, got {port}"):
        Table.kept(first, {})


def test_one_machine_listens_to_itself_only() -> None:
    table = Table.kept(Layout(1, 2), {})
    listening = subprocess.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in listening.splitlines() if f":{table.port:04X} " in line and " 0A " in line] == [
        f"0100007F:{table.port:04X}"
    ]


# The other machines, where there is nothing to join


@contextlib.contextmanager
def second(file: Path, monkeypatch: pytest.MonkeyPatch, port: int, limit: int = 60) -> Iterator[None]:
    with monkeypatch.context() as there:
        for name, value in of_node(1, port, limit).items():
            there.setenv(name, value)
        yield


def test_a_machine_alone_ends_with_a_clear_status(opened: Any, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    file = opened()
    with second(file, monkeypatch, port, limit=1), pytest.raises(NodeLost) as caught:
        train.work(str(file), "north", TURN)
    assert caught.value.reason == "another node was lost"
    assert rounds_of(file).reports(1, 1) == {}


def test_what_is_delivered_already_needs_no_second_machine(opened: Any, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    file = opened()
    assert train.work(str(file), "north", TURN) == "north ok"
    began = time.monotonic()
    with second(file, monkeypatch, port):
        assert train.work(str(file), "north", TURN) == "north ok"
    assert time.monotonic() - began < 1


def test_a_machine_that_comes_too_late_ends_as_the_first_has(opened: Any, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    file = opened()
    rounds_of(file).write_report(Report(round=1, attempt=1, silo="north", status="failed", reason="out of memory"))
    monkeypatch.setattr(train, "OLD", 0.5)
    with second(file, monkeypatch, port):
        assert train.work(str(file), "north", TURN) == "north failed: out of memory"


@pytest.mark.parametrize(
    ("over", "answer"),
    [
        ({"exit_code": 0, "message": "", "reason": ""}, "north ok"),
        ({"exit_code": 4, "message": "round 1 does not ask it", "reason": "not a participant"}, "RefusedError not a participant"),
        (None, "NodeLost another node was lost"),
    ],
)
def test_where_the_first_machine_does_not_train_the_second_ends_soon(
    opened: Any, monkeypatch: pytest.MonkeyPatch, port: int, over: dict[str, Any] | None, answer: str
) -> None:
    """It has come, and waits for the order; the first finds nothing to do, is refused, or dies."""
    file = opened()
    first, other = layouts(port)
    answers: list[str] = []

    def join() -> None:
        try:
            answers.append(train.work(str(file), "north", TURN))
        except SilotuneError as error:
            answers.append(f"{type(error).__name__} {error.reason}")

    with second(file, monkeypatch, port):
        joining = threading.Thread(target=join)
        joining.start()
        table = Table.kept(first, train._topic(other, Federation.load(file), "north", Turn.parse(TURN)))
        table.gather()
        began = time.monotonic()
        if over is not None:
            table.close(over)
        del table
        joining.join(20)
    assert answers == [answer]
    assert time.monotonic() - began < 3


# Real processes


@pytest.mark.slow
def test_two_processes_do_a_silos_round(opened: Any) -> None:
    file = opened()
    assert ended(start(file, PET_NPROC_PER_NODE="2")) == (0, "north ok")
    rounds = rounds_of(file)
    manifest = rounds.update(1, "north")
    assert manifest is not None
    assert (manifest.steps, manifest.examples, manifest.cursor) == (4, 12, 12)
    assert rounds.reports(1, 1)["north"].numbers["tokens"] == manifest.tokens
    assert len(rounds.evaluations(manifest.incoming, "valid")) == 1
    header = read_header(home_of(file) / "update.safetensors")
    assert (header.tokens, header.loss) == (manifest.tokens, manifest.loss)
    assert sorted(p.name for p in home_of(file).iterdir() if p.name != "base") == [
        "data.json", "heartbeat.json", "incoming.safetensors", "logs", "shards", "silo.lock", "update.safetensors",
    ]  # fmt: skip
    beat = read_heartbeat(home_of(file) / "heartbeat.json")
    assert beat is not None
    assert (beat.step, beat.steps) == (4, 4)
    assert workers_of(file) == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_two_machines_do_a_silos_round(opened: Any, port: int, processes: int, tmp_path: Path) -> None:
    file = opened()
    jobs = [start(file, **of_node(node, port, processes=processes)) for node in (1, 0)]
    assert [ended(job) for job in jobs] == [(0, "north ok")] * 2
    rounds = rounds_of(file)
    manifest = rounds.update(1, "north")
    assert manifest is not None
    assert (manifest.steps, manifest.examples) == (4, 12)
    assert list(rounds.reports(1, 1)) == ["north"]
    assert sorted(p.name for p in (home_of(file) / "logs").iterdir()) == ["train-node1.log", "train.log"]
    assert workers_of(file) == []


@pytest.mark.slow
def test_one_and_two_processes_send_the_same_update(make_federation: Any, tmp_path: Path) -> None:
    losses, norms = [], []
    for count in (1, 2, 3):
        file = make_federation(tmp_path / str(count), training=TRAINING)
        initialize.work(str(file), *(preprocess.work(str(file), s) for s in SILOS))
        assert ended(start(file, PET_NPROC_PER_NODE=str(count))) == (0, "north ok")
        manifest = rounds_of(file).update(1, "north")
        assert manifest is not None
        losses.append(manifest.loss)
        norms.append(manifest.norm)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-2)


def training_at(file: Path, step: int, silo: str = "north", seconds: float = 300) -> None:
    """Waits until it is at that step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (beat := read_heartbeat(home_of(file, silo) / "heartbeat.json")) and beat.box == "train" and beat.step >= step:
            return
        time.sleep(0.05)
    raise AssertionError("it did not train")


LONG = {"steps": 100_000, "batch_size": 3, "learning_rate": 1e-5}


@pytest.mark.slow
def test_where_a_process_dies_the_training_ends_and_says_so(opened: Any) -> None:
    file = opened(training=LONG)
    job = start(file, PET_NPROC_PER_NODE="2")
    training_at(file, 3)
    began = time.monotonic()
    os.kill(workers_of(file)[1], signal.SIGKILL)
    assert ended(job) == (1, "north failed: killed by signal 9")
    assert time.monotonic() - began < 30
    assert workers_of(file) == []
    assert rounds_of(file).reports(1, 1)["north"].text == "failed: killed by signal 9"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_a_machine_dies_the_other_ends(opened: Any, port: int, victim: int) -> None:
    """Dies: the supervisor is killed, as a pod is, and with it all that it has started."""
    file = opened(training=LONG)
    jobs = [start(file, **of_node(node, port)) for node in (0, 1)]
    training_at(file, 3)
    began = time.monotonic()
    jobs[victim].kill()
    code, status = ended(jobs[1 - victim])
    assert (code, status) == (1, "north failed: another node was lost") or status == "north failed: another process was lost"
    assert time.monotonic() - began < 60
    jobs[victim].communicate()
    end = time.monotonic() + 10
    while workers_of(file) and time.monotonic() < end:
        time.sleep(0.1)
    assert workers_of(file) == []


@pytest.mark.slow
def test_a_failure_on_the_second_machine_is_the_silos_reason(opened: Any, port: int) -> None:
    file = opened(training=LONG)
    jobs = [start(file, **of_node(node, port, processes=1)) for node in (0, 1)]
    training_at(file, 3)
    second = [p for p in workers_of(file) if b"PET_NODE_RANK=1" in Path(f"/proc/{p}/environ").read_bytes()]
    os.kill(second[0], signal.SIGKILL)
    assert [ended(job) for job in jobs] == [(1, "north failed: killed by signal 9")] * 2
    assert rounds_of(file).reports(1, 1)["north"].reason == "killed by signal 9"


@pytest.mark.slow
def test_at_the_deadline_two_machines_send_what_they_have(opened: Any, port: int) -> None:
    file = opened(training=LONG, rounds={"total": 1, "deadline": "3m", "min_fraction": 0.00001, "checkpoint_every": 50})
    jobs = [start(file, **of_node(node, port)) for node in (0, 1)]
    assert [ended(job) for job in jobs] == [(0, "north ok")] * 2
    manifest = rounds_of(file).update(1, "north")
    assert manifest is not None
    assert 0 < manifest.steps < LONG["steps"]
