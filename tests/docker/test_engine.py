"""`silotune run --engine docker` with a real engine and the real images: whole runs, broken ones, and what the containers could see."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from silotune.components.federation import Federation
from silotune.components.protocol import Commit
from silotune.components.rounds import Rounds
from silotune.pipelines import docker_engine
from silotune.pipelines.docker_engine import FEDERATION_LABEL

pytestmark = pytest.mark.images

SILOTUNE = [sys.executable, "-m", "silotune.pipelines.cli"]
BOXES = Path("/opt/silotune/package/silotune/components")  # in the images
LIAR = """
def run(federation, turn, statuses):
    return "/models/of/nobody"
"""


@pytest.fixture(scope="module")
def client(engine: str) -> Any:
    return docker_engine.connect()


class Containers:
    """What the containers of one federation were given, looked at while they ran: party -> as `docker inspect` tells it."""

    def __init__(self, client: Any, file: Path) -> None:
        self.client, self.file = client, file
        self.seen: dict[str, dict[str, Any]] = {}

    def now(self, box: str = "", party: str = "") -> list[Any]:
        """Those that are there; with a box and a party, only those that run it."""
        found = self.client.containers.list(all=True, filters={"label": f"{FEDERATION_LABEL}={self.file}"}, ignore_removed=True)
        for container in found:
            self.seen[variables(container)["SILOTUNE_PARTY"]] = container.attrs
        return (
            [
                c
                for c in found
                if c.status == "running" and f"def {box}(" in str(c.attrs["Args"]) and variables(c)["SILOTUNE_PARTY"] == party
            ]
            if box
            else found
        )

    def wait_for(self, box: str, party: str, seconds: float = 600) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.now(box, party):
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"no container of {box} {party} within {seconds:g} s")

    def gone(self, seconds: float = 15) -> bool:
        end = time.monotonic() + seconds
        while self.now() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.now()


def variables(container: Any) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in container.attrs["Config"]["Env"])


def silotune(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SILOTUNE, *map(str, words)], capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=1800
    )


def run(file: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return silotune("run", file, "--engine", "docker", *words, **environment)


@pytest.fixture
def begin() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts runs, and stops those that the test has not seen to their end."""
    begun: list[subprocess.Popen[str]] = []

    def start(file: Path) -> subprocess.Popen[str]:
        words = [*SILOTUNE, "run", str(file), "--engine", "docker"]
        begun.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True))
        return begun[-1]

    yield start
    for going in begun:
        if going.poll() is None:
            going.terminate()
            going.communicate(timeout=60)


def commits(file: Path) -> list[Commit]:
    return list(Rounds.of(Federation.load(file)).commits())


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[..., Path]:
    """Writes a federation of two silos and one round; sections of the file can be changed."""
    spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
    assert spec
    assert spec.loader
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)

    def file(**sections: Any) -> Path:
        known = {"silos": ("east", "north"), "rounds": {"total": 1, "quorum": 1}}
        written: Path = fixtures.write_federation(tmp_path_factory.mktemp("docker"), tiny_llama, **known | sections)
        return written

    return file


@pytest.fixture(scope="module")
def finished(client: Any, silo_image: str, coordinator_image: str, make: Any) -> tuple[Path, str, Containers]:
    """Three silos, two rounds and MLflow in a file, run to the end: (file, what was said, what its containers were given)."""
    three = {"silos": ("east", "north", "south"), "rounds": {"total": 2, "quorum": 2}}
    file = make(**three, tracking={"uri": "sqlite:///.silotune/mlflow.db"})
    containers, done = Containers(client, file), threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            containers.now()

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        ran = run(file)
    finally:
        done.set()
        watcher.join()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return file, ran.stdout + ran.stderr, containers


def test_the_federation_is_in_the_store_and_exported(finished: Any) -> None:
    file, said, containers = finished
    course = commits(file)
    assert [(c.round, c.outcome) for c in course] == [(0, "initialized"), (1, "aggregated"), (2, "aggregated")]
    assert all(sorted(c.contributions) == ["east", "north", "south"] for c in course[1:])
    exported = next(iter(Rounds.of(Federation.load(file)).exports()))
    from silotune.components.store.content import file_digest

    assert {name: file_digest(Path(exported.location) / name) for name in exported.files} == exported.files
    assert "adapter_model.safetensors" in exported.files
    assert "round 2 committed" in said
    assert silotune("verify", file).returncode == 0
    assert containers.gone(), "containers outlived the run"


def test_mlflow_has_its_rounds(finished: Any) -> None:
    import sqlite3

    with sqlite3.connect(finished[0].parent / ".silotune" / "mlflow.db") as database:
        rows = database.execute("select step from metrics where key = 'global/loss' order by step").fetchall()
    assert [row[0] for row in rows] == [0, 1, 2]


def test_a_run_as_processes_gives_the_same_bytes(finished: Any, make: Any, silo_image: str, engine: str) -> None:
    import torch

    asked = [engine, "run", "--rm", "--network", "none", silo_image, "python3", "-c", "import torch; print(torch.__version__)"]
    theirs = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if theirs != torch.__version__:
        pytest.skip(f"PyTorch {theirs} in the image, {torch.__version__} here")
    file = make(silos=("east", "north", "south"), rounds={"total": 2, "quorum": 2})
    ran = silotune("run", file)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [c.outgoing for c in commits(file)] == [c.outgoing for c in commits(finished[0])]


def test_each_container_has_its_partys_files_and_no_rights(finished: Any) -> None:
    file, _, containers = finished
    federation = Federation.load(file)
    assert set(containers.seen) == {"coordinator", "east", "north", "south"}
    for party, attrs in containers.seen.items():
        host = attrs["HostConfig"]
        assert (host["NetworkMode"], host["ReadonlyRootfs"], host["CapDrop"]) == ("none", True, ["ALL"])
        assert "no-new-privileges" in host["SecurityOpt"]
        assert attrs["Config"]["User"] == f"{os.getuid()}:{os.getgid()}"
        places = {Path(m["Source"]): m["RW"] for m in attrs["Mounts"] if m["Type"] == "bind"}
        for other in federation.silos:
            records = {Path(p) for p in (other.train, other.valid, other.test) if p}
            if other.id == party:
                assert {p: places.get(p) for p in records} == dict.fromkeys(records, False)
                assert places[Path(other.storage)] is True
            else:
                within = [p for p in places if any(p == r or p in r.parents for r in {*records, Path(other.storage)})]
                assert not within, f"{party} sees {within}"
        assert (federation.work in places) == (party == "coordinator")


def test_what_is_mounted_is_all_there_is(client: Any, finished: Any, silo_image: str) -> None:
    """From inside: a silo's container finds its records and can write neither them nor its root, and another's are not there."""
    file, _, containers = finished
    federation, attrs = Federation.load(file), containers.seen["north"]
    own, other = federation.silo("north").train, federation.silo("east").train
    probe = (
        "import json, os, pathlib, sys\n"
        "def can(mode, path):\n"
        "    try: open(path, mode).close()\n"
        "    except OSError as error: return error.strerror\n"
        "    return 'yes'\n"
        f"print(json.dumps([can('r', {own!r}), can('a', {own!r}), can('r', {other!r}), can('w', '/etc/x'), can('w', '/tmp/x')]))\n"
    )
    from docker.types import Mount

    mounts = [Mount(m["Target"], m["Source"], type="bind", read_only=m.get("ReadOnly", False)) for m in attrs["HostConfig"]["Mounts"]]
    said = client.containers.run(silo_image, ["python3", "-c", probe], remove=True, mounts=mounts, **docker_engine.restrictions([]))
    assert json.loads(said) == ["yes", "Read-only file system", "No such file or directory", "Read-only file system", "yes"]


def test_running_again_does_nothing_and_needs_no_engine(finished: Any) -> None:
    ran = run(finished[0], DOCKER_HOST="unix:///nowhere")
    assert (ran.returncode, "nothing left to do" in ran.stdout) == (0, True)


# Trouble


@pytest.fixture
def stray(client: Any, coordinator_image: str) -> Iterator[Callable[[Path], Any]]:
    """Starts containers such as a killed run leaves behind."""
    made = []

    def start(file: Path) -> Any:
        labels = {FEDERATION_LABEL: str(file)}
        made.append(client.containers.run(coordinator_image, ["python3", "-c", "import time; time.sleep(600)"], labels=labels,
                                          environment={"SILOTUNE_PARTY": "east"}, detach=True))  # fmt: skip
        return made[-1]

    yield start
    from docker.errors import NotFound

    for container in made:
        try:
            container.remove(force=True)
        except NotFound:
            continue


def test_a_silo_with_broken_records_misses_the_round_and_stale_containers_go(
    client: Any, silo_image: str, coordinator_image: str, make: Any, stray: Any
) -> None:
    file = make()
    (file.parent / "data" / "east" / "train.jsonl").write_text("{no json\n")
    old, others = stray(file), stray(file.with_name("another.yaml"))
    ran = run(file)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "east: preprocess failed" in ran.stdout
    last = commits(file)[-1]
    assert (sorted(last.contributions), last.missing) == (["north"], {"east": "failed: data or settings are wrong"})
    left = {c.id for c in client.containers.list(all=True, filters={"label": FEDERATION_LABEL})}
    assert old.id not in left
    assert others.id in left


def test_too_few_silos_are_exit_code_3(silo_image: str, coordinator_image: str, make: Any) -> None:
    file = make(rounds={"total": 1, "quorum": 2})
    east = file.parent / ".silotune-private" / "east"
    east.mkdir(parents=True)
    (east / "tiny").write_text("a file where its folder should be")
    ran = run(file)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    assert "2 of 2 silos must deliver, 1 did" in ran.stderr


def test_a_box_that_says_it_went_well_and_did_nothing_is_found_out(
    engine: str, silo_image: str, coordinator_image: str, make: Any, tmp_path: Path
) -> None:
    """As when the runner takes a container that failed for one that did well: only the store knows."""
    (tmp_path / "step.py").write_text(LIAR)
    (tmp_path / "Dockerfile").write_text(f"FROM {silo_image}\nCOPY --chmod=644 step.py {BOXES}/export/step.py\n")
    subprocess.run(
        [engine, "build", "-q", "-t", "silotune-liar:test", str(tmp_path)],
        check=True,
        capture_output=True,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
    )
    try:
        file = make()
        ran = run(file, "--silo-image", "silotune-liar:test")
        assert ran.returncode == 1, ran.stdout + ran.stderr
        assert "the pipeline says that it went well" in ran.stderr
        assert "the model is not exported" in ran.stderr
        assert len(commits(file)) == 2
        assert run(file).returncode == 0, "the honest image makes up for it"
    finally:
        subprocess.run([engine, "rmi", "-f", "silotune-liar:test"], check=False, capture_output=True)


def test_a_killed_container_ends_the_run_and_the_next_goes_on(
    client: Any, silo_image: str, coordinator_image: str, make: Any, begin: Any
) -> None:
    file = make()
    going, containers = begin(file), Containers(client, file)
    containers.wait_for("train", "north").kill()
    said = going.communicate(timeout=300)[0]
    assert going.returncode == 1, said
    assert "0 of 1 rounds are committed" in said
    assert str(file.parent / ".silotune" / "runs") in said, "the log is named"
    ran = run(file)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(commits(file)[-1].contributions) == ["east", "north"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_no_container(
    client: Any, silo_image: str, coordinator_image: str, make: Any, begin: Any, number: int, code: int
) -> None:
    file = make()
    going, containers = begin(file), Containers(client, file)
    containers.wait_for("preprocess", "north")
    assert run(file).returncode == 4, "a second run of the file must wait"
    os.kill(going.pid, number)
    said = going.communicate(timeout=60)[0]
    assert going.returncode == code, said
    assert "Traceback" not in said
    assert containers.gone(60 if number == signal.SIGKILL else 0), "containers outlived the run"


def test_an_absent_image_is_told_with_the_cure(engine: str, make: Any) -> None:
    ran = run(make(), "--silo-image", "silotune-silo:of-nobody")
    assert ran.returncode == 2
    assert "there is no image silotune-silo:of-nobody; run `make images`, or name one that is there with --silo-image" in ran.stderr


def test_a_store_in_s3_is_reached_over_loopback(
    silo_image: str, coordinator_image: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        place = {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="rounds")
        file = make(storage={"root": "s3://rounds/tiny"})
        ran = run(file)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert [c.outcome for c in commits(file)] == ["initialized", "aggregated"]
        written = b"".join(p.read_bytes() for p in (file.parent / ".silotune" / "runs").rglob("*") if p.is_file())
        assert b"AWS_SECRET_ACCESS_KEY" not in written
    finally:
        server.stop()
