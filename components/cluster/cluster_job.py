"""A silo's work as a Job: created in the silo's own namespace, followed to its end, told as a status.

    run(federation, silo, box, turn)      what a silo's box does on Kubernetes instead of `silo_job.supervise`

The launcher needs one right, on Jobs: create, get, list, watch, delete; with ``placement.trainer: trainjob`` the same on TrainJobs. All that it says follows from the Job's own conditions and, of a
training, from what the silo has put into the store, which is the truth. Where pods may be read, too, reasons become finer (in brackets):

    ok                                       the Job is complete [for preprocess: with the digests of base and tokenizer]
    late: past the deadline                  the Job's deadline has passed
    late: never started                      its pod was not running by then [late: unschedulable: insufficient nvidia.com_gpu]
    late: not all nodes started              of a training on several nodes, some were not running by then
    late: suspended                          a queue has kept its TrainJob back
    refused: by the silo                     the silo's step refused
    refused: forbidden                       the silo's cluster does not let the launcher handle Jobs
    refused: admission policy: image         the silo's admission policy, with the first word of its message
    failed: data or settings are wrong, store unreachable or full, see the log of the silo, stopped, exit code N
    failed: out of memory or killed          exit code 137 [out of memory]
    failed: evicted or node lost             the pod was disrupted [evicted, preempted, node lost]
    failed: image cannot be pulled           [only there; else it never started]
    failed: quota exceeded, not authenticated, no such namespace, no Kubeflow Trainer, Job not valid,
            Job deleted, nothing in the store, its pod failed, cluster unreachable

Whatever ends a launcher, SIGTERM included, leaves its Job running: a launcher that is evicted comes back and finds the Job by its name, and a
Job nobody comes back for ends at its own deadline; its update still counts while the round is open. A finished Job of a training stands, since
its name has the attempt in it; one of a box that belongs to no round is of an earlier run, and is made anew.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from silotune.components.cluster import job_manifest, train_job
from silotune.components.cluster.job_end import (
    NEVER_STARTED,
    NO_IMAGE,
    SOME_NEVER_STARTED,
    SUSPENDED,
    End,
    condition_of,
    is_running,
    is_suspended,
    pending,
    verdict,
    why_pending,
)  # fmt: skip
from silotune.components.cluster.job_manifest import Manifest
from silotune.components.cluster.jobs_api import NOT_AUTHENTICATED, Exists, JobsApi, TryAgain, connect
from silotune.components.errors import RefusedError, SilotuneError
from silotune.components.federation import Federation
from silotune.components.process.progress import tell
from silotune.components.protocol import Turn
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import has_trained
from silotune.components.silo_job import PAST_DEADLINE, status_text

PATIENCE = 600.0  # seconds without an answer, or of one that says try again, before the launcher gives up
STUCK = 300.0  # seconds an image may fail to be pulled, where pods can be seen
LONGEST_WAIT = 30.0  # seconds between two tries at an API server that does not answer
WATCH = 60.0  # seconds one watch lasts; then the Job is looked at anew, whatever the watch said
T = TypeVar("T")


@dataclass(frozen=True)
class Clock:
    """Time as the launcher sees it, in seconds."""

    now: Callable[[], float] = time.monotonic
    unix: Callable[[], float] = time.time  # for the silo, which compares it with its own
    sleep: Callable[[float], None] = time.sleep
    share: Callable[[], float] = random.random  # in [0, 1): spreads tries


def run(
    federation: Federation, silo_id: str, box: str, turn_text: str = "", *,
    kubeconfig: Path | None = None, clock: Clock | None = None, watch: float = WATCH,
) -> str:  # fmt: skip
    """Have a silo's cluster do the work of one box, and return its status; a Job of the same work that is there already is followed.

    Args:
        box: ``preprocess``, ``train``, ``share``, ``mask``, ``confirm``, ``unmask`` or ``evaluate``.
        turn_text: as the box gets it; empty for preprocess.
        kubeconfig: file for the silo's cluster; default: the one that SILOTUNE_KUBECONFIG names, else the cluster this pod runs in.
        watch: seconds that one watch lasts.

    Raises:
        FederationError: the federation does not name the silo.
        RefusedError: ``turn_text`` is no turn.
    """
    silo = federation.silo(silo_id)
    turn = Turn.parse(turn_text) if turn_text else Turn()
    if box == "train" and turn.done:
        return status_text(silo_id, "ok", "nothing to do")
    clock = clock or Clock()
    tell(box, "started", silo_id, round=turn.round)
    began = clock.now()
    end = _by_store(federation, silo_id, turn) if box == "train" else None
    if end is None or end.status != "ok":
        try:
            of_trainer = train_job.wanted(silo, box)
            manifest_of = train_job.train_job_of if of_trainer else job_manifest.job_of
            deadline = federation.deadline_seconds
            until = None if deadline is None else math.ceil(clock.unix() + deadline)
            manifest = manifest_of(federation, silo_id, box, turn_text, until)
            if box == "train":
                _require_ready(federation, silo_id, turn)
            limit = float(job_manifest.longest(federation))
            end = _Launch(lambda: connect(silo, kubeconfig), manifest, silo_id, clock, watch, limit).outcome()
        except SilotuneError as error:
            end = End("refused" if isinstance(error, RefusedError) else "failed", error.reason, str(error))
        if box == "train":
            end = _by_store(federation, silo_id, turn) or _without_trace(federation, silo_id, turn, end)
    status = status_text(silo_id, end.status, end.reason)
    if end.detail:  # the launcher's own and the API server's words, for the coordinator's log; nothing of the silo's
        print(f"{box} {silo_id}: {end.detail}", file=sys.stderr, flush=True)
    tell(box, "ended", silo_id, status=status, detail=end.detail, seconds=round(clock.now() - began, 2))
    return status


def _by_store(federation: Federation, silo_id: str, turn: Turn) -> End | None:
    """What the store says of a training; None where it says nothing, or cannot be asked."""
    try:
        rounds = Rounds.of(federation)
        if has_trained(rounds, turn, silo_id):
            return End("ok")
        report = rounds.reports(turn.round, turn.attempt).get(silo_id)
    except (SilotuneError, OSError):
        return None
    return End(report.status, report.reason) if report else None


def _require_ready(federation: Federation, silo_id: str, turn: Turn) -> None:
    """Raises RefusedError where the attempt does without the silo: no node need be found for that."""
    try:
        why = Rounds.of(federation).attempt(turn.round, turn.attempt).missing.get(silo_id)
    except (SilotuneError, OSError):
        return  # the silo finds out by itself
    if why:
        raise RefusedError(f"silo {silo_id!r}: was not ready when this attempt began; run again once it is", why)


def _without_trace(federation: Federation, silo_id: str, turn: Turn, end: End) -> End:
    """The Job's word, unless it says ok and the store, which can be asked, has nothing."""
    if end.status == "ok":
        try:
            Rounds.of(federation).attempt(turn.round, turn.attempt)
        except (SilotuneError, OSError):
            return end
        return End("failed", "nothing in the store", "the Job is complete, and the store has neither update nor report")
    return end


class _Launch:
    """One launcher's dealings with one Job."""

    def __init__(self, connect: Callable[[], Any], manifest: Manifest, silo: str, clock: Clock, watch: float, limit: float) -> None:
        meta, spec = manifest["metadata"], manifest["spec"]
        self.api = JobsApi(connect, meta["namespace"], meta["name"], clock.now, of_trainer=manifest["kind"] == "TrainJob")
        self.nodes = spec["trainer"]["numNodes"] if self.api.of_trainer else spec["parallelism"]
        self.manifest, self.silo, self.clock, self.watch = manifest, silo, clock, watch
        self.of_a_round = manifest["metadata"]["labels"]["silotune.dev/round"] != "0"
        self.limit = limit
        self.until = clock.now() + self.limit
        self.uid = ""
        self.ready = 0  # the most pods that ran at once
        self.started = False
        self.stuck_since: float | None = None

    def outcome(self) -> End:
        """Create or find the Job, and follow it to its end."""
        self.uid = self._patiently(self._begin)["metadata"]["uid"]
        while True:
            began = self.clock.now()
            try:
                end = self._patiently(self._follow)
            except TryAgain as error:
                late = self.clock.now() >= self.until
                return End("late", PAST_DEADLINE, str(error)) if late else End("failed", error.reason, str(error))
            if end is not None:
                return end
            if self.clock.now() - began < 1:  # somebody on the way ends watches at once
                self.clock.sleep(1)

    def _patiently(self, action: Callable[[], T]) -> T:
        """Try until it succeeds, with ever longer pauses.

        Raises:
            TryAgain: the API server has not answered well for `PATIENCE`, or the deadline has passed without an answer.
        """
        self.api.heard, tries = self.clock.now(), 0
        while True:
            asked = self.clock.now()
            try:
                return action()
            except TryAgain as error:
                now = self.clock.now()
                if now - self.api.heard >= PATIENCE or now >= self.until + job_manifest.MARGIN:
                    raise
                if error.reason == NOT_AUTHENTICATED:
                    self.api.reconnect()
                tries = 0 if self.api.heard > asked else tries + 1
                self.clock.sleep(min(LONGEST_WAIT, 0.5 * 2**tries) * (0.5 + self.clock.share() / 2))

    def _begin(self) -> Manifest:
        """The Job: made, or found where the same work has one."""
        heard = self.api.heard
        try:
            made = self.api.create(self.manifest)
            self.until = self.clock.now() + self.limit
            if self.api.of_trainer:
                same = ("silotune.dev/federation", "silotune.dev/silo")
                self.api.tidy({name: self.manifest["metadata"]["labels"][name] for name in same})
            return made
        except Exists:
            job, age, _ = self.api.look()
        if job is None or job["metadata"].get("deletionTimestamp"):
            raise TryAgain("a Job of the same name is just being deleted", "Job not deleted")
        self._require_ours(job)
        if condition_of(job) and not self.of_a_round:
            self.api.delete(job["metadata"]["uid"])
            self.api.heard = heard  # one that cannot be deleted is not waited for without end
            raise TryAgain("a finished Job of an earlier run is being deleted", "Job not deleted")
        self.until = self.clock.now() + self.limit - age
        return job

    def _require_ours(self, job: Manifest) -> None:
        labels = job["metadata"].get("labels") or {}
        if odd := sorted(k for k, v in self.manifest["metadata"]["labels"].items() if labels.get(k) != v):
            raise RefusedError(
                f"Job {self.api.namespace}/{self.api.name}: is not of this work, {', '.join(odd)} differ; delete it", "Job not ours"
            )

    def _follow(self) -> End | None:
        """The end; None after a watch that has brought none, to be called again."""
        job, _, version = self.api.look()
        if job is None:
            return self._deleted()
        if end := self._judge(job) or self._overdue(job):
            return end
        left = self._due() - self.clock.now()
        for kind, changed in self.api.events(version, max(1, math.ceil(min(self.watch, left)))):
            if kind == "DELETED":
                return self._deleted()
            if end := self._judge(changed):
                return end
        return None

    def _judge(self, job: Manifest) -> End | None:
        """How the Job ended; None while it goes on."""
        if job["metadata"]["uid"] != self.uid:  # another launcher has made it anew
            self._require_ours(job)
            self.uid = job["metadata"]["uid"]
        self.ready = max(self.ready, (job.get("status") or {}).get("ready") or 0)
        self.started = self.started or self.ready > 0
        condition = condition_of(job)
        if condition and condition["type"] == "Failed" and self.api.of_trainer:
            condition = self.api.cause() or condition
        return verdict(condition, self.api.pods(self.uid), self.silo) if condition else self._stuck()

    def _due(self) -> float:
        """When to give up a Job: one that has not started at the round's deadline, else later, since it may still say that it is late."""
        return self.until - (0 if self.started else job_manifest.MARGIN)

    def _overdue(self, job: Manifest) -> End | None:
        """The end of a Job whose time is over."""
        now = self.clock.now()
        if now < self._due():
            return None
        pods = self.api.pods(self.uid)
        if any(is_running(p) for p in pods) and now < self.until:
            self.started = True
            return None
        self.api.delete(job["metadata"]["uid"])
        if self.ready >= self.nodes or (self.started and self.nodes == 1):
            return End("late", PAST_DEADLINE)
        why = pending([p for p in pods if not is_running(p)])
        if why == NEVER_STARTED and is_suspended(job):
            why = SUSPENDED
        if why == NEVER_STARTED and self.started:
            why = SOME_NEVER_STARTED
        return End("late", why, "its pod was not running at the deadline; ask the silo for the events of the Job")

    def _stuck(self) -> End | None:
        """The end of a Job whose image cannot be had for so long that it will not be; to be seen only where pods are."""
        if self.started or not any(why_pending(p) == NO_IMAGE for p in self.api.pods(self.uid)):
            self.stuck_since = None
            return None
        self.stuck_since = self.stuck_since or self.clock.now()
        if self.clock.now() - self.stuck_since < STUCK:
            return None
        self.api.delete(self.uid)
        return End("failed", NO_IMAGE, "correct placement.image, or give the cluster access to the registry")

    def _deleted(self) -> End:
        if self.clock.now() >= self.until - job_manifest.MARGIN:  # another launcher has given it up
            return End("late", PAST_DEADLINE)
        return End("failed", "Job deleted", "the Job was deleted before it had ended; run again")
