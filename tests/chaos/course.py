"""The course of one scenario: its lives, what happens between them, and what must hold."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks  # noqa: F401 - lives are forked right after threads have verified signatures
import invariants
import traps
from board import STORE_FAULTS, Board
from damage import Damage, alter
from faults import FaultyProxy
from invariants import Broken, Course, require
from life import Gate, Life, prepare
from scenario import FOUR, S3_VARIABLE, SILOS, STEPS, Ordeal, Scenario, Trap

from silotune.components.federation import Federation
from silotune.components.rounds import Rounds

MOST_LIVES = 12
LIFE_SECONDS, SCENARIO_SECONDS = 240.0, 900.0  # many times what they take on a machine that is not busy
CLIP = 0.05  # that binds, where silos clip
BUCKET = "chaos"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "chaos", "AWS_DEFAULT_REGION": "us-east-1",
               "AWS_CONFIG_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixtures = _module(Path(__file__).parents[1] / "conftest.py")


@dataclass
class World:
    """What the scenarios of one worker share: a folder, a base model, undisturbed references, and an S3 server where one is asked for."""

    folder: Path
    server: subprocess.Popen[str] | None = None
    endpoint: str = ""
    bucket: str = BUCKET

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def federation(self, folder: Path, rounds: int, quorum: int, *, secure: bool = False, **more: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        terms = {"steps": STEPS, "batch_size": 3, "learning_rate": 0.01}
        asked = {"total": rounds, "quorum": quorum, "checkpoint_every": 1}
        model = {"base": str(self.base), "lora": {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": "all-linear"}}
        if secure:
            more |= {"privacy": {"secure_aggregation": {}}, "aggregation": {"weights": "uniform", "clip": {"norm": CLIP}}}
        silos = FOUR if secure else SILOS
        file: Path = fixtures.write_federation(folder, self.base, silos, model=model, rounds=asked, training=terms, **more)
        return file

    def reference(self, course: Course, scenario: Scenario) -> list[str]:
        """The globals of a federation in which exactly these silos deliver, all of them in the rounds to come, and nothing goes wrong; made once."""
        rounds, silos = scenario.rounds, scenario.silos
        course = (*course, *[(silos, ())] * (rounds - len(course)))
        absent = {n: sorted(set(silos) - set(parts)) for n, (parts, _) in enumerate(course, 1)}
        name = "-".join([*(["secure"] if scenario.secure else []), str(rounds), *("+".join(parts) for parts, _ in course)])
        known = self.folder / "references" / f"{name}.json"
        if not known.exists():
            folder = known.with_suffix(f".{os.getpid()}.folder")
            file = self.federation(folder, rounds, quorum=min([3, *(len(parts) for parts, _ in course)]), secure=scenario.secure)
            running = start(Life(file, Board(), absent=absent, silos=silos, secure=scenario.secure), folder / "log", {})
            watch([running], time.monotonic() + LIFE_SECONDS)
            require(running.board.result.get("code") == 0, f"the undisturbed reference {name} fails: {running.board.result}")
            part = known.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps([c.outgoing for c in Rounds.of(Federation.load(file)).commits()]))
            part.replace(known)
            shutil.rmtree(folder)
        return [str(digest) for digest in json.loads(known.read_text())]

    def s3(self) -> str:
        """The endpoint of the S3 server that was given, or of this worker's own."""
        if given := os.environ.get(S3_VARIABLE):
            self.endpoint, self.bucket = given, os.environ["SILOTUNE_CHAOS_BUCKET"]
        elif not self.server:
            self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.server.stdout
            self.endpoint = self.server.stdout.readline().strip()
            os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=self.endpoint)
            import boto3

            boto3.session.Session().client("s3", endpoint_url=self.endpoint).create_bucket(Bucket=BUCKET)
        return self.endpoint

    def close(self) -> None:
        if self.server and self.server.stdin:
            self.server.stdin.close()
            self.server.wait(timeout=20)


@dataclass
class Running:
    """A life in a process of its own."""

    pid: int
    board: Board
    trap: Trap | None
    gate: Gate | None
    trace: Path
    tracer: subprocess.Popen[str] | None = None
    status: int | None = None

    @property
    def killed(self) -> bool:
        return self.status is not None and os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


def start(life: Life, log: Path, environment: Mapping[str, str], *preparation: Any) -> Running:
    """Fork a life; this process has imported all that is heavy, and used none of it."""
    gate = Gate.new() if life.trap and traps.STRACE else None
    life.gate = gate
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
            folder = log.with_suffix(".run")
            folder.mkdir(exist_ok=True)
            os.environ.update(environment, SILOTUNE_RUN=str(folder))
            if preparation:
                prepare(preparation[0], life.board, *preparation[1:])
            life.run()
            os._exit(0)
        finally:
            os._exit(70)  # a life never goes on as its watcher
    return Running(pid, life.board, life.trap, gate, log.with_suffix(".strace"))


def watch(lives: list[Running], until: float) -> None:
    """To the end of all of them. Raises Broken where one does not end."""
    try:
        while any(one.status is None for one in lives):
            waiting = [one for one in lives if one.status is None and one.gate and not one.tracer]
            for ready in select.select([one.gate.ready[0] for one in waiting if one.gate], [], [], 0.01)[0]:
                one = next(o for o in waiting if o.gate and o.gate.ready[0] == ready)
                assert one.gate
                assert one.trap
                one.tracer = traps.attach(one.pid, one.trap, one.trace)
                os.write(one.gate.go[1], b"x")
            for one in lives:
                if one.status is None and (ended := os.waitpid(one.pid, os.WNOHANG))[0]:
                    one.status = ended[1]
            require(time.monotonic() < until, f"a life does not end; it is in {[o.board.box for o in lives if o.status is None]}")
    finally:
        for one in lives:
            if one.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
                one.status = os.waitpid(one.pid, 0)[1]
            if one.tracer:
                one.tracer.wait(timeout=20)
                assert one.tracer.stderr
                one.tracer.stderr.close()
            if one.gate:
                one.gate.close()


@dataclass
class Scene:
    """One scenario on its way."""

    scenario: Scenario
    world: World
    folder: Path
    tally: collections.Counter[str] = field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        s3 = self.scenario.store == "s3"
        if s3:
            os.environ["AWS_ENDPOINT_URL"] = self.world.s3()
        more = {"storage": {"root": f"s3://{self.world.bucket}/{self.folder.name}-{os.getpid()}-{time.time_ns()}"}} if s3 else {}
        self.file = self.world.federation(self.folder, self.scenario.rounds, self.scenario.quorum, secure=self.scenario.secure, **more)
        self.federation = Federation.load(self.file)
        self.committed: dict[int, str] = {}
        self.damages: list[Damage] = []
        self.messages: list[str] = []  # of the last life
        self.done = False

    def rounds(self) -> Rounds:
        return Rounds.of(Federation.load(self.file))

    def run(self) -> None:
        """Raises Broken."""
        for number, ordeal in enumerate(self.scenario.ordeals):
            self.live(number, ordeal)
            if ordeal.damage and (damage := alter(self.rounds(), ordeal.damage, self.scenario.rng("damage", number))):
                self.damages.append(damage)
                self.tally[f"fault: {damage.told}"] += 1
        self.done = False  # what was altered since is to be met
        for number in range(len(self.scenario.ordeals), MOST_LIVES):
            self.live(number, Ordeal())
            if self.done:
                break
        require(self.done, f"not done after {MOST_LIVES} lives: {self.messages}")
        self.tally["mended by hand"] += invariants.unbroken(self.federation, self.rounds, self.damages, self.folder / "rebuilt")
        rounds = self.rounds()
        self.committed = invariants.stands(rounds, self.committed)
        require(len(self.committed) == self.scenario.rounds + 1, f"{len(self.committed) - 1} rounds are committed")
        self.tally["secure sums opened"] += self.scenario.secure * self.scenario.rounds
        self._count_work(rounds)

    def live(self, number: int, ordeal: Ordeal) -> None:
        """One life, or two at once, and what must hold after it."""
        require(time.monotonic() - self.began < SCENARIO_SECONDS, "the scenario takes too long")
        standing = [d for d in self.damages if d.there(self.rounds().store)]
        with self._network(number, ordeal) as (environment, faults):
            both = [ordeal.trap, *([ordeal.twin] if ordeal.twinned else [])]
            lives = [
                start(
                    Life(self.file, Board(), trap, silos=self.scenario.silos, secure=self.scenario.secure, dead=ordeal.dead),
                    self.folder / f"life-{number}-{i}.log",
                    environment,
                    self.scenario,
                    faults,
                    (number, i),
                )
                for i, trap in enumerate(both)
            ]
            watch(lives, time.monotonic() + LIFE_SECONDS)
        self.tally["second runs at once"] += len(lives) - 1
        for death in ordeal.dead:
            self.tally[f"fault: silo dead before {death.stage}"] += 1
        self.messages = [m for one in lives for m in one.board.result.get("messages", [])]
        for one in lives:
            self._count(one)
            self._ended_well(one)
        self.done = any(one.board.result.get("code") == 0 for one in lives)
        undisturbed = ordeal == Ordeal() and not self.done
        for damage in standing:
            self._after(damage, sole=undisturbed and len(standing) == 1)
        self._hold()

    def _hold(self) -> None:
        rounds = self.rounds()
        self.committed = invariants.stands(rounds, self.committed)
        if self.committed:
            invariants.only_what_is_committed_shows(self.federation, rounds)
            invariants.same_globals(rounds, lambda course: self.world.reference(course, self.scenario))
            if self.scenario.secure:
                for number in range(1, max(self.committed) + 2):
                    invariants.one_sum_is_opened(rounds, number)

    def _after(self, damage: Damage, sole: bool) -> None:
        """What a life had to make of an altered object: it says which one it is, or has mended it, or had no use for it."""
        store = self.rounds().store
        named = damage.named(self.messages)
        if sole:
            require(named or not damage.there(store), f"a life fails, and does not name {damage.key}, which was altered: {self.messages}")
        self.tally["refusals that name the object"] += named
        if damage.mends:
            self.tally["mended by itself"] += not damage.there(store)
        elif damage.there(store) and (damage.what in ("record", "withheld") or named):
            chained = any(part in damage.key for part in ("commit.json", "plan.json", "audit/", "agreements/"))
            require(named or not chained or invariants.noticed(self.rounds), f"nothing names {damage.key}, which was altered")
            damage.restore(store)
            self.tally["restored from a backup"] += 1

    def _ended_well(self, one: Running) -> None:
        result = one.board.result
        require(not result.get("traces"), f"nobody foresaw this: {''.join(result.get('traces', []))}")
        require(one.killed or result, f"a life ends without a result, by status {one.status}, in {one.board.box}")
        require(not one.killed or (one.trap and one.trap.kills), f"a life was killed that nobody meant to kill, in {one.board.box}")

    def _count(self, one: Running) -> None:
        self.tally["lives"] += 1
        for name in ("trainings", "steps", "put"):
            self.tally[name] += one.board[name]
        for name in STORE_FAULTS:
            self.tally[f"fault: store {name}"] += one.board[name]
        self.tally["fault: no room on disk"] += traps.refused_calls(one.trace) + one.board["no room"]
        if one.killed and one.trap:
            self.tally["fault: kill -9"] += 1
            self.tally[f"killed: {one.board.box} {one.trap.calls[0]}"] += 1
        else:
            self.tally["lives that fail"] += bool(one.board.result.get("code"))

    def _count_work(self, rounds: Rounds) -> None:
        parts = [c for commit in rounds.commits() for c in commit.contributions.values()]
        stored = sum(rounds.store.size(key) or 0 for key in rounds.store.list(""))
        self.tally["trainings repeated"] = max(0, self.tally["trainings"] - len(parts))
        self.tally["steps repeated"] = max(0, self.tally["steps"] - sum(c.steps for c in parts))
        self.tally["bytes stored"] = stored
        self.tally["bytes sent again"] = max(0, self.tally["put"] - stored)

    @contextlib.contextmanager
    def _network(self, number: int, ordeal: Ordeal) -> Iterator[tuple[dict[str, str], Mapping[str, float]]]:
        """(environment, faults of the store) of a life; on S3 it is the way there that goes wrong."""
        if self.scenario.store == "folder" or not ordeal.faults:
            yield {}, ordeal.faults
            return
        with FaultyProxy(self.world.endpoint, self.scenario.rng("network", number).randrange(2**32), ordeal.faults, stall=0.1) as proxy:
            yield {"AWS_ENDPOINT_URL": proxy.endpoint}, {}
        for kind, count in proxy.injected.items():
            self.tally[f"fault: network {kind}"] += count


__all__ = ["Broken", "Scene", "World"]
