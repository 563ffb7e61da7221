"""A scenario: what happens to one federation, drawn from a seed. The same seed always draws the same.

A federation lives some disturbed lives, one after the other, and then undisturbed ones until it is done. A disturbed life may be killed at a
system call, find the disk full for a while, work on a store or behind a network that goes wrong, or meet a second run at the same time;
between lives, bytes in the store may be altered.

One seed of five is of a federation of four silos that sums securely, any three of which can open a sum. There, one or two silos may be dead in a
round from some stage on, and a record of a sum may be withheld for a life.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

SILOS = ("east", "north", "south")
FOUR = (*SILOS, "west")  # of a federation that sums securely
STEPS = 4  # of every silo in every round, with a checkpoint after each
STAGES = ("share", "mask", "confirm", "unmask")  # of a secure sum, behind a muster each
PLAIN = ("preprocess", "initialize", "train", "aggregate", "evaluate", "export")
BOXES = (*PLAIN, "muster", *STAGES)
EVERY = 20  # of so many seeds, the last one is a whole run through KFP
SECURE_EVERY, SECURE = 5, 2  # of so many seeds, which one sums securely

# Calls that one box makes in a life without trouble, measured with strace on Linux; fewer where it has made most of its files before.
USUAL: Mapping[str, Mapping[str, int]] = {
    "preprocess": {"openat": 80, "mkdir": 15, "flock": 1, "unlink": 1, "write": 16, "rename": 6},
    "initialize": {"openat": 221, "mkdir": 23, "flock": 4, "unlink": 19, "write": 22, "fsync": 39, "rename": 11, "link": 8, "unlinkat": 1},
    "train": {"openat": 130, "mkdir": 9, "flock": 1, "write": 15, "rename": 9, "renameat": 4, "unlink": 9, "fsync": 19, "link": 3, "rmdir": 4},
    "aggregate": {"openat": 265, "mkdir": 6, "write": 12, "rename": 6, "unlink": 9, "fsync": 10, "unlinkat": 5, "link": 3},
    "evaluate": {"openat": 182, "mkdir": 6, "flock": 1, "write": 9, "rename": 4, "unlink": 7, "fsync": 9, "link": 4},
    "export": {"openat": 275, "mkdir": 12, "write": 15, "rename": 6, "renameat": 1, "unlink": 8, "fsync": 16, "unlinkat": 7, "link": 2},
    "muster": {"openat": 57, "mkdir": 1, "unlink": 1, "fsync": 3, "link": 1},
    "share": {"openat": 62, "mkdir": 3, "flock": 1, "unlink": 1, "fsync": 3, "link": 1},
    "mask": {"openat": 169, "mkdir": 6, "flock": 1, "write": 5, "rename": 4, "unlink": 5, "fsync": 9, "link": 1},
    "confirm": {"openat": 77, "mkdir": 3, "flock": 1, "write": 1, "rename": 1, "unlink": 2, "fsync": 5, "link": 1},
    "unmask": {"openat": 125, "mkdir": 3, "flock": 1, "unlink": 1, "fsync": 3, "link": 1},
}  # fmt: skip
SENDS = 12  # `sendto` of a box that works on S3: two a request at least
FULL = (("write", "pwrite64", "ftruncate"), ("fsync",), ("mkdir", "link", "rename", "renameat"))  # calls that find no room
TROUBLES = ("kill", "full", "faults", "damage", "twin")
SECURE_TROUBLES = (*TROUBLES, "dead")
S3_VARIABLE = "SILOTUNE_CHAOS_S3"  # an S3 endpoint that all scenarios use; credentials and an empty bucket named by SILOTUNE_CHAOS_BUCKET
EVENTS = 30  # lines that a whole run of two rounds tells, about


@dataclass(frozen=True)
class Trap:
    """At which call of which box of a life something happens."""

    box: str
    occurrence: int  # the so-manieth start of that box in this life
    calls: tuple[str, ...]  # system calls
    first: int  # counted from that start on, each name for itself
    last: int = 0  # of those that find no room; 0: the process is killed at the first

    @property
    def kills(self) -> bool:
        return self.last == 0


@dataclass(frozen=True)
class Death:
    """A silo that does no more in a round."""

    silo: str
    round: int
    stage: str  # the first one that it misses: train, or one of `STAGES`

    def misses(self, box: str) -> bool:
        order = ("train", *STAGES)
        return order.index(self.stage) <= order.index(box)


@dataclass(frozen=True)
class Ordeal:
    """One disturbed life."""

    trap: Trap | None = None
    faults: Mapping[str, float] = field(default_factory=dict)  # of the store, or of the network where the store is S3
    twin: Trap | None = None  # of a second life at the same time
    twinned: bool = False
    damage: str = ""  # update, global or record: what is altered after it; withheld: a record is not there in the next life
    dead: tuple[Death, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """All that is drawn."""

    seed: int
    rounds: int
    quorum: int
    store: str  # folder or s3
    ordeals: tuple[Ordeal, ...] = ()
    kills: tuple[float, ...] = ()  # of a whole run: when its process group is killed, see `whole_run`
    secure: bool = False

    @property
    def silos(self) -> tuple[str, ...]:
        return FOUR if self.secure else SILOS

    @property
    def whole_run(self) -> bool:
        """Through KFP, as `silotune run` does. Each kill is a number of events plus a part of a second; below 1 it is seconds / 5."""
        return bool(self.kills)

    def rng(self, *what: object) -> random.Random:
        """Random numbers of one thing in this scenario."""
        return random.Random(f"{self.seed} {what}")


def draw(seed: int) -> Scenario:
    rng = random.Random(f"chaos {seed}")
    given = bool(os.environ.get(S3_VARIABLE))
    if seed % EVERY == EVERY - 1 and not given:
        kills = tuple(rng.uniform(0, EVENTS) for _ in range(rng.choice((1, 1, 2))))
        return Scenario(seed, rounds=2, quorum=3, store="folder", kills=kills)
    secure = seed % SECURE_EVERY == SECURE
    rounds = rng.choice((2, 2, 3))
    quorum = 2 if rng.random() < 0.2 and not secure else 3
    store = "s3" if rng.random() < 0.12 or given else "folder"
    troubles = set(rng.sample(SECURE_TROUBLES, rng.choice((2, 3, 3, 4))) if secure else rng.sample(TROUBLES, rng.choice((1, 2, 2, 3))))
    lives = rng.randint(1, 3)
    harmed = rng.randrange(lives) if "damage" in troubles else -1
    twinned = rng.randrange(lives) if "twin" in troubles else -1
    ordeals = []
    for life in range(lives):
        damage = rng.choice(("update", "global", "record", *(("update", "record", "withheld") if secure else ()))) if life == harmed else ""
        faults = _rates(rng, store) if "faults" in troubles else {}
        trap = _midway(rng, damage, rounds, secure) if damage else _trap(rng, troubles, rounds, store, secure)
        twin = _trap(rng, troubles, rounds, store, secure) if life == twinned else None
        dead = tuple(_death(rng, silo, rounds) for silo in rng.sample(FOUR, rng.choice((1, 1, 2)))) if "dead" in troubles else ()
        ordeals.append(Ordeal(trap, faults, twin, life == twinned, damage, dead))
    return Scenario(seed, rounds, quorum, store, tuple(ordeals), secure=secure)


def _death(rng: random.Random, silo: str, rounds: int) -> Death:
    return Death(silo, rng.randint(1, rounds), rng.choice(("train", *STAGES)))


def _trap(rng: random.Random, troubles: set[str], rounds: int, store: str, secure: bool) -> Trap | None:
    kind = rng.choice(sorted(troubles & {"kill", "full"}) or [""])
    box = rng.choice((*BOXES, *STAGES, "muster") if secure else (*PLAIN, "train", "train"))  # most of a life is training, or a sum
    silos = len(FOUR if secure else SILOS)
    times = dict.fromkeys(("train", *STAGES), silos * rounds) | {
        "muster": len(STAGES) * rounds,
        "aggregate": rounds,
        "initialize": 1,
        "export": 1,
    }
    occurrence = rng.randint(1, times.get(box, silos))
    usual = {**USUAL[box], **({"sendto": SENDS} if store == "s3" else {})}
    if kind == "kill":
        call = rng.choice(sorted(usual))
        return Trap(box, occurrence, (call,), rng.randint(1, usual[call]))
    if kind == "full":
        calls = rng.choice(FULL)
        first = rng.randint(1, max(usual.get(call, 1) for call in calls))
        return Trap(box, occurrence, calls, first, first + rng.choice((0, 2, 10, 40)))
    return None


def _midway(rng: random.Random, damage: str, rounds: int, secure: bool) -> Trap:
    """A death after which there is something to alter: for an update, one before the round is committed."""
    number = rng.randint(1, rounds)  # the round
    if secure and damage in ("update", "withheld"):
        box = rng.choice(("confirm", "unmask", "aggregate") if damage == "update" else (*STAGES, "aggregate"))
        return Trap(box, number if box == "aggregate" else len(FOUR) * number - rng.randrange(4), ("openat",), rng.randint(1, 30))
    box = rng.choice(("train", "aggregate")) if damage == "update" else rng.choice(("train", "aggregate", "evaluate"))
    if box == "train":
        silos = len(FOUR if secure else SILOS)
        return Trap(box, silos * number - (0 if damage == "update" else rng.randrange(3)), ("openat",), rng.randint(1, 100))
    return Trap(box, number if box == "aggregate" else 1, ("openat",), rng.randint(1, 30))


def _rates(rng: random.Random, store: str) -> dict[str, float]:
    """Some kinds of fault, a few in a life's hundreds of calls; a connection carries many requests, so more of those go wrong."""
    kinds, most = (("reset", "stall", "truncate", "delay"), 0.5) if store == "s3" else (
        ("drop-before", "drop-after", "delay", "duplicate", "truncate", "flip"), 0.02)  # fmt: skip
    chosen = rng.sample(kinds, rng.randint(1, len(kinds)))
    total = rng.uniform(0.2, 1.0) * most
    return {kind: total / len(chosen) for kind in chosen}
