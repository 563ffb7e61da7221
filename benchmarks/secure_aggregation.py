"""What does secure aggregation cost beyond plain?

    python benchmarks/secure_aggregation.py [--silos 5 10 30] [--numbers 20000000] [--dropouts 0 0.3] [--folder FOLDER]

Whole rounds without training, by the boxes' own steps, on one thread: every silo has the same made-up update, and masks it by itself. Silos that
drop out do so after all have shared their secrets, which costs most. Seconds are CPU seconds of this process, of silos their mean; bytes are
those of records and vectors, as the store has them. Plain is the same update as a silo sends it, and the mean that aggregate makes of such.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before numpy

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from silotune.components import keys, opening
from silotune.components.aggregate.intake import Intake
from silotune.components.aggregate.secure import secure_sum
from silotune.components.confirm import step as confirm
from silotune.components.federation import Federation
from silotune.components.learning.aggregation.combination import Round, combine, combine_sum
from silotune.components.learning.tensor_file import open_tensor_file, to_bytes, write_tensor_file
from silotune.components.learning.update import Codec, Header, write_update
from silotune.components.mask import step as mask
from silotune.components.muster import step as muster
from silotune.components.protocol import Commit, Turn
from silotune.components.rounds import Rounds
from silotune.components.secure_sum.records import SecureRound
from silotune.components.secure_sum.silo import UPDATE, SiloPart
from silotune.components.share import step as share
from silotune.components.silo_job import silo_home
from silotune.components.train.step import _manifest
from silotune.components.unmask import step as unmask

STEPS, BATCH, TENSORS = 8, 4, 20
CLIP = 1.0


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


class Trial:
    """A federation with round 1 open, and every silo's update in its folder."""

    def __init__(self, folder: Path, silos: int, numbers: int, *, secure: bool) -> None:
        self.folder, self.ids = folder, [f"s{n:02d}" for n in range(silos)]
        folder.mkdir(parents=True)
        terms: dict[str, Any] = {
            "name": "bench", "model": {"base": "./base", "method": "full"}, "silos": [{"id": s, "train": f"./{s}.jsonl"} for s in self.ids],
            "rounds": {"total": 9, "quorum": 1}, "training": {"steps": STEPS, "batch_size": BATCH}, "tracking": {"uri": "none"},
            "aggregation": {"weights": "uniform"} | ({"clip": {"norm": CLIP}} if secure else {"fan_in": 64}),
        }  # fmt: skip
        if secure:
            terms["privacy"] = {"secure_aggregation": {}}
        self.file = folder / "federation.yaml"
        self.file.write_text(yaml.safe_dump(terms))
        self.federation = Federation.load(self.file)
        keys.ensure(self.federation)
        self.rounds = Rounds.of(self.federation)
        agreement = self.federation.agreement("b" * 64, "t" * 64)
        self.rounds.put_agreement(agreement)
        self.agreement = agreement
        shapes = {f"layers.{n:02d}.weight": (numbers // TENSORS,) for n in range(TENSORS)}
        zeros = np.zeros(numbers // TENSORS, np.float32)
        write_tensor_file(folder / "global", shapes, "F32", ((n, to_bytes(zeros, "F32")) for n in sorted(shapes)), {"format": "pt"})
        self.rounds.write_commit(
            Commit(
                round=0, outcome="initialized", custody="local", best=0, agreement=agreement.digest, plan=None, attempt=0, contributions={},
                missing={}, previous=None, incoming=None, outgoing=self.rounds.put_object(folder / "global"), started=1.0, at=1.0,
            )
        )  # fmt: skip
        latest = self.rounds.latest()
        assert latest is not None
        self.turn = opening.open_next(self.federation, self.rounds, latest, agreement, {}).text
        plan = self.rounds.plan(1)
        assert plan is not None
        self.plan = plan
        rng = np.random.default_rng(1)
        tensors = {n: rng.standard_normal(s, np.float32) * np.float32(0.9 * CLIP / numbers**0.5) for n, s in shapes.items()}
        for silo in self.ids if not secure else self.ids[:1]:
            self.header = Header(
                federation="bench", agreement=plan.agreement, round=1, silo=silo, plan=plan.digest, base=plan.base, incoming=plan.incoming,
                examples=STEPS * BATCH, tokens=9, steps=STEPS, cursor=STEPS * BATCH, loss=1.0, norm=0.0, codec=Codec(name="float32"), tensors={},
            )  # fmt: skip
            self.header = write_update(self.home(silo) / UPDATE, self.header, tensors, lambda m, s=silo: self.rounds.sign(s, 1, m))
        for silo in self.ids[1:] if secure else ():
            os.link(self.home(self.ids[0]) / UPDATE, self.home(silo) / UPDATE)

    def home(self, silo: str) -> Path:
        return silo_home(self.federation, self.federation.silo(silo))

    def bytes_of(self, *parts: str) -> int:
        keys = self.rounds.store.list(self.rounds.key("rounds", "00001", "secagg", *parts))
        return sum(self.rounds.store.size(key) or 0 for key in keys)


def secure_round(folder: Path, silos: int, numbers: int, share_of_dropouts: float) -> dict[str, float]:
    trial = Trial(folder, silos, numbers, secure=True)
    file, turn = str(trial.file), trial.turn
    costs: dict[str, list[float]] = {"silo": [0.0] * silos, "muster": []}
    plan = trial.plan

    def each(work: Callable[[str], Any], ids: list[str]) -> list[float]:
        found = []
        for silo in ids:
            seconds, _ = timed(lambda s=silo: work(s))
            found.append(seconds)
            costs["silo"][trial.ids.index(silo)] += seconds
        return found

    found: dict[str, float] = {}
    alive = trial.ids
    each(lambda s: SiloPart.of(trial.federation, trial.rounds, plan, Turn.parse(turn), s, trial.home(s)).advertise(), alive)
    for stage, step in (("share", share), ("mask", mask), ("confirm", confirm), ("unmask", unmask)):
        costs["muster"].append(timed(lambda st=stage: muster.work(file, turn, st))[0])
        if stage == "mask":
            alive = trial.ids[: silos - int(share_of_dropouts * silos)]
        found[stage] = statistics.mean(each(lambda s, box=step: box.work(file, s, turn), alive))
    survivors = SecureRound.of(trial.rounds, Turn.parse(turn), plan.digest).survivors()
    assert survivors is not None
    assert len(survivors.members) == len(alive)
    incoming = open_tensor_file(folder / "global")
    opened_in, opened = timed(lambda: secure_sum(trial.rounds, plan, trial.agreement, survivors, folder))
    given = Round(trial.agreement.aggregation, incoming, silos)
    combined_in, _ = timed(lambda: combine_sum(given, opened.path, opened.weights, folder))
    up = trial.bytes_of("1") / silos
    down = sum(trial.bytes_of(f"1/{folder}") for folder in ("keys", "shares", "masked", "confirmations"))
    vector = next(iter(opened.records.values())).bytes
    found |= {
        "silo": statistics.mean(costs["silo"][: len(alive)]), "muster": sum(costs["muster"]), "aggregate": opened_in + combined_in,
        "records up": up, "records down": down, "vector": vector,
    }  # fmt: skip
    return found


def plain_round(folder: Path, silos: int, numbers: int) -> dict[str, float]:
    trial = Trial(folder, silos, numbers, secure=False)
    seconds = []
    for silo in trial.ids:
        path = trial.home(silo) / UPDATE
        from silotune.components.learning.update import read_header

        took, manifest = timed(lambda s=silo, p=path: trial.rounds.write_update(_manifest(trial.rounds, trial.plan, read_header(p), p)))
        seconds.append(took)
        path.unlink()
    incoming = open_tensor_file(folder / "global")

    def mean() -> None:
        intake = Intake.of("aggregate", trial.rounds, trial.plan, trial.agreement, trial.rounds.updates(1)[0], folder)
        combine(Round(trial.agreement.aggregation, incoming, silos), intake.accepted, folder)

    took, _ = timed(mean)
    return {"silo": statistics.mean(seconds), "aggregate": took, "bytes": float(manifest.bytes)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--silos", type=int, nargs="+", default=[5, 10, 30])
    parser.add_argument("--numbers", type=int, default=20_000_000)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(
        "| silos | dropped out | a silo, s | of it masking, s | aggregate, s | musters, s | a silo plain, s | aggregate plain, s | "
        "records up, kB | records down, kB | vector / update bytes |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for silos in options.silos:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            plain = plain_round(Path(name) / "plain", silos, options.numbers)
        for dropouts in options.dropouts:
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                found = secure_round(Path(name) / "secure", silos, options.numbers, dropouts)
                shutil.rmtree(Path(name) / "secure")
            print(
                f"| {silos} | {int(dropouts * silos)} | {found['silo']:.2f} | {found['mask']:.2f} | {found['aggregate']:.2f} | "
                f"{found['muster']:.2f} | {plain['silo']:.2f} | {plain['aggregate']:.2f} | {found['records up'] / 1e3:.1f} | "
                f"{found['records down'] / 1e3:.1f} | {found['vector'] / plain['bytes']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
