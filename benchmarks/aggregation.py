"""What does aggregation cost beside reading the bytes?

    python benchmarks/aggregation.py [mean] [robust] [--silos 32] [--numbers 20000000] [--repeats 3] [--folder FOLDER]

Each part prints Markdown. Every measurement runs in a process of its own, on one thread, so that its peak memory is its own; measurements to be
compared take turns, and of each the fastest run counts. Files are read once before, so that they lie in the page cache.

    mean    the weighted mean of float32 updates: decoding and averaging, and the same with digests, norms and signatures checked, beside
            reading the bytes, hashing them, torch adding them up from mapped files, and numpy averaging them in memory; then ten times as many
            updates, and the cost of 10, 100 and 1,000 small ones
    robust  medians, trimmed means, Krum and the geometric median beside plain numpy, and rules on LoRA's products
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from robust import measure_robust, part_robust
from turns import MIB, Measured, in_turns, measured, timed
from updates import make_updates, shapes_of

# mean

LABELS = {
    "read": "(a) reading the bytes",
    "hash": "(b) hashing them (SHA-256)",
    "torch": "(c) torch adding in place from mapped files",
    "numpy": "(d) numpy's average of what is in memory",
    "mean": "decode and mean, next global on disk",
    "checked": "the same with digests, norms and signatures",
    "covered": "that, each clipped and the sum covered by noise (privacy.silo)",
}


def measure_mean(what: str, folder: str, files: int, silos: int, numbers: int) -> Measured:
    """
    Args:
        silos: updates to average; the ``files`` there are, over and over.
    """
    paths = [Path(folder) / f"{k % files:04d}" for k in range(silos)]
    out = Path(folder) / "out"
    if what == "read":
        buffer = bytearray(4 * MIB)

        def read() -> None:
            for path in paths:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        return timed(read)
    if what == "hash":
        return timed(lambda: [hash_file(path) for path in paths])
    if what == "torch":
        import torch

        torch.set_num_threads(1)

        def add() -> None:
            total = torch.zeros(numbers)
            for path in paths:
                with path.open("rb") as file:
                    skip = 8 + int.from_bytes(file.read(8), "little")
                mapped = torch.from_file(str(path), False, path.stat().st_size // 4)
                total.add_(mapped[skip // 4 :], alpha=3.0)

        return timed(add)
    import numpy as np

    if what == "numpy":
        table = np.stack([np.fromfile(path, np.float32)[-numbers:] for path in paths])
        weights = np.arange(1, silos + 1, dtype=np.float32)
        return timed(lambda: np.average(table, axis=0, weights=weights))

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from silotune.components.learning.aggregation.combination import Round, combine
    from silotune.components.learning.aggregation.mean import FEDAVG, finish, weighted_mean
    from silotune.components.learning.aggregation.summation import FAN_IN, Term
    from silotune.components.learning.privacy.noise import Noise
    from silotune.components.learning.privacy.silo_noise import Layer, SiloNoise
    from silotune.components.learning.tensor_file import open_tensor_file
    from silotune.components.learning.update import Expectation, Update, open_update
    from silotune.components.terms.strategies import Aggregation, Clip

    incoming = open_tensor_file(Path(folder) / "incoming")
    if what == "mean":

        def mean() -> None:
            terms = [Term(open_tensor_file(path), 3.0 + k) for k, path in enumerate(paths)]
            finish(incoming, terms, sum(t.weight for t in terms), silos, out, FEDAVG, None, FAN_IN, lambda: None)

        return timed(mean)
    public = Ed25519PublicKey.from_public_bytes((Path(folder) / "key").read_bytes())

    def verify(message: bytes, signature: str) -> bool:
        public.verify(base64.b64decode(signature), message)
        return True

    def opened() -> dict[str, Update]:
        updates = {}
        for k, path in enumerate(paths):
            expected = Expectation(
                federation="f", agreement="a", plan="p", base="b", accepted=((1, "i"),), silo=path.name, cursor=0, codec="float32",
                schema={n: list(s) for n, s in shapes_of(numbers).items()}, verify=verify,
            )  # fmt: skip
            updates[f"{k:04d}"] = open_update(path, expected)
        return updates

    def checked() -> None:
        updates = opened()
        weighted_mean(incoming, updates, {s: 3.0 + k for k, s in enumerate(updates)}, out)

    def covered() -> None:
        noise = SiloNoise(2.0, [Layer(1, Noise(bytes(32)))], numbers, silos, FAN_IN)
        terms = Aggregation(strategy="fedavg", weights="uniform", clip=Clip(norm=0.1))
        combine(Round(terms, incoming, silos, noise=noise), opened(), Path(folder))

    return timed(covered if what == "covered" else checked)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ratio(what: str, one: Measured, others: list[Measured], most: float) -> str:
    """One measurement beside the sum of others, by the clock and by the processor's time, which counts: on an idle machine the two agree."""
    wall, cpu = (one[key] / sum(other[key] for other in others) for key in ("wall", "cpu"))
    return f"| {what} | {wall:.2f} | {cpu:.2f} | {most:.1f} | {'yes' if cpu <= most else 'NO'} |"


def part_mean(options: argparse.Namespace) -> None:
    size = options.numbers * 4 / MIB
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_updates(Path(folder), options.silos, options.numbers)
        about = {"folder": folder, "files": options.silos, "silos": options.silos, "numbers": options.numbers}
        measured("mean", "read", about)
        found = in_turns("mean", list(LABELS), about, options.repeats)
        many = in_turns("mean", ["torch", "hash", "checked", "covered"], about | {"silos": 10 * options.silos}, 1)
    print(f"\n{options.silos} updates of {options.numbers:,} float32 numbers ({size:.0f} MiB each), one thread\n")
    print("| | wall s | CPU s | GB/s | memory above the start, MiB |\n|---|--:|--:|--:|--:|")
    rows = [(LABELS[name], m, options.silos) for name, m in found.items()]
    rows += [(f"{LABELS[name]}, {10 * options.silos} updates", many[name], 10 * options.silos) for name in ("checked", "covered")]
    for label, m, silos in rows:
        print(f"| {label} | {m['wall']:.2f} | {m['cpu']:.2f} | {silos * size / 954 / m['wall']:.2f} | {m['peak'] - m['base']:.0f} |")
    print("\n| ratio | wall | CPU | at most | held |\n|---|--:|--:|--:|---|")
    print(ratio("decode and mean / (c)", found["mean"], [found["torch"]], 1.5))
    print(ratio("with all checks / ((b) + (c))", found["checked"], [found["hash"], found["torch"]], 1.2))
    print(ratio("the same, ten times as many", many["checked"], [many["hash"], many["torch"]], 1.2))
    for name, runs, silos in (
        ("checked", found, options.silos),
        ("checked", many, 10 * options.silos),
        ("covered", many, 10 * options.silos),
    ):
        times = (runs[name]["peak"] - runs[name]["base"]) / size
        what = "under privacy.silo" if name == "covered" else ""
        print(f"| memory of {silos} updates {what} / one update | {times:.2f} | | 3.0 | {'yes' if times <= 3 else 'NO'} |")
    print_curve(options)


def print_curve(options: argparse.Namespace) -> None:
    numbers, files = 1_000_000, 10
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_updates(Path(folder), files, numbers)
        print(
            f"\nUpdates of {numbers:,} numbers, with all checks\n\n"
            "| updates | wall s | CPU s | CPU ms per update | memory above the start, MiB |\n|--:|--:|--:|--:|--:|"
        )
        for silos in (10, 100, 1000):
            about = {"folder": folder, "files": files, "silos": silos, "numbers": numbers}
            m = in_turns("mean", ["checked"], about, options.repeats)["checked"]
            print(f"| {silos} | {m['wall']:.3f} | {m['cpu']:.3f} | {1000 * m['cpu'] / silos:.2f} | {m['peak'] - m['base']:.0f} |")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"mean": part_mean, "robust": part_robust}
MEASURES: dict[str, Callable[..., Measured]] = {"mean": measure_mean, "robust": measure_robust}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them if none is named")
    parser.add_argument("--silos", type=int, default=32)
    parser.add_argument("--numbers", type=int, default=20_000_000, help="of each update")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are made; needs 4 bytes for every number of every update")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.parts[0]](options.measure, **json.loads(options.arguments))))
        return
    for name in options.parts or PARTS:
        print(f"## {name}", flush=True)
        PARTS[name](options)


if __name__ == "__main__":
    main()
