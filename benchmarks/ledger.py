"""What does a ledger of 10,000 trainings cost to look up?

    python benchmarks/ledger.py [--entries 10000] [--kinds 1 4 12] [--folder FOLDER]

Prints Markdown. A ledger of so many entries is written into a folder and into a bucket of moto (a server process on this machine), and read back and
verified whole by a fresh process each time, as a training does before it begins. Then ε of all entries is composed, where they are of one, four, or
twelve kinds (sampling probability, noise), again each in a process of its own; importing what it needs is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


def open_ledger(location: str, keys_folder: Path, copied: bool = True) -> Any:
    from silotune.components import keys
    from silotune.components.steward.ledger import Ledger
    from silotune.components.store.object_store import open_store
    from silotune.components.terms.security import PublicKey

    private = keys.private_key(keys_folder / "north.pem")
    public = [PublicKey(public=(keys_folder / "north.pub").read_text().strip())]
    copies = keys_folder / "copies" if copied and location.startswith("s3:") else None
    return Ledger(open_store(location), "letters", lambda message: keys.signature(private, message), public, copies)


def charge(number: int, kinds: int) -> Any:
    from silotune.components.learning.privacy.accounting import Mechanism
    from silotune.components.steward.entry import Charge

    kind = Mechanism(sampling_probability=0.002 + 0.0001 * (number % kinds), noise_multiplier=2.0 + 0.1 * (number % kinds), steps=20)
    return Charge(
        federation=f"fed-{number // 50}", agreement="a" * 64, plan=f"{number:064d}", round=number % 50 + 1, silo="north", content="c" * 64,
        mechanism=kind, delta=1e-6,
    )  # fmt: skip


def part_write(location: str, folder: Path, entries: int, kinds: int) -> float:
    book = open_ledger(location, folder, copied=False)
    book.entries()
    began = time.perf_counter()
    for number in range(entries):
        assert book.append(charge(number, kinds), 1.7e9 + 3600.0 * number)
    return time.perf_counter() - began


def part_read(location: str, folder: Path, entries: int, kinds: int) -> float:
    book = open_ledger(location, folder)
    began = time.perf_counter()
    assert len(book.entries()) == entries
    return time.perf_counter() - began


def part_every(location: str, folder: Path, entries: int, kinds: int) -> float:
    book = open_ledger(location, folder)
    began = time.perf_counter()
    assert len(book.every_entry()) == entries
    return time.perf_counter() - began


def part_compose(location: str, folder: Path, entries: int, kinds: int) -> float:
    import dp_accounting.pld  # noqa: F401

    from silotune.components.steward.budget import bound

    charges = [charge(number, kinds) for number in range(entries)]
    began = time.perf_counter()
    assert bound(charges, 1e-6, "record") > 0
    return time.perf_counter() - began


PARTS = {"write": part_write, "read": part_read, "every": part_every, "compose": part_compose}


def measured(part: str, location: str, folder: Path, entries: int, kinds: int = 4, times: int = 3) -> float:
    """Seconds; of several runs the fastest counts."""
    words = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--location",
        location,
        "--folder",
        str(folder),
        "--entries",
        str(entries),
        "--kinds",
        str(kinds),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout for _ in range(times)]
    return min(json.loads(out) for out in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--kinds", type=int, nargs="+", default=[1, 4, 12])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--location", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part](given.location, given.folder, given.entries, given.kinds[0])))
        return

    from silotune.components import keys

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        keys.new(folder, "north")
        print(f"| ledger of {given.entries:,} entries | seconds |\n|---|--:|")
        wrote = measured("write", str(folder / "store"), folder, given.entries, times=1)
        print(f"| append an entry to a folder, on average | {wrote / given.entries:.4f} |")
        print(f"| read and verify all, in a folder | {measured('read', str(folder / 'store'), folder, given.entries):.2f} |", flush=True)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert server.stdin
        assert server.stdout
        try:
            os.environ |= {
                "AWS_ENDPOINT_URL": f"http://{server.stdout.readline().strip()}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                "AWS_DEFAULT_REGION": "us-east-1",
            }  # fmt: skip
            import boto3

            boto3.client("s3").create_bucket(Bucket="ledgers")
            measured("write", "s3://ledgers", folder, given.entries, times=1)
            fetched = measured("read", "s3://ledgers", folder, given.entries, times=1)
            print(f"| fetch and verify all, from S3 (moto), for the first time | {fetched:.2f} |", flush=True)
            print(
                f"| verify all, from S3 with the silo's copy | {measured('read', 's3://ledgers', folder, given.entries):.2f} |", flush=True
            )
            every = measured("every", "s3://ledgers", folder, given.entries, times=1)
            print(f"| read every object of it anew, as `silotune privacy` does, from S3 | {every:.2f} |", flush=True)
        finally:
            server.stdin.close()
            server.wait(timeout=20)
        for kinds in given.kinds:
            took = measured("compose", "-", folder, given.entries, kinds, times=2)
            print(f"| epsilon of all, of {kinds} kind{'s' * (kinds > 1)} | {took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
