"""`silotune run` as a user runs it: KFP on this machine, every task a process, killed, run again, and searched for leaks."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.federation import Federation
from silotune.components.rounds import Rounds

SILOTUNE = [sys.executable, "-m", "silotune.pipelines.cli"]
CANARY = "zqxj kvwz jqzx vkqj"


def silotune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SILOTUNE, *arguments], capture_output=True, text=True, check=False)


@dataclass
class Finished:
    """A federation that `silotune run` has run to its end."""

    file: Path
    output: str

    @property
    def federation(self) -> Federation:
        return Federation.load(self.file)

    @property
    def globals(self) -> list[str]:
        return [c.outgoing for c in Rounds.of(self.federation).commits()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Finished:
    """Run once for all tests that only look; silo east has a canary in each of its splits."""
    folder = tmp_path_factory.mktemp("run")
    file = _planted(folder, tiny_llama)
    done = silotune("run", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(file, done.stdout + done.stderr)


def _planted(folder: Path, base: Path) -> Path:
    import importlib.util

    spec = importlib.util.spec_from_file_location("fixtures", Path(__file__).parents[1] / "conftest.py")
    assert spec
    assert spec.loader
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    file: Path = fixtures.write_federation(folder, base, tracking={"uri": "sqlite:///.silotune/mlflow.db"})
    for split in ("train", "valid", "test"):
        with (folder / "data" / "east" / f"{split}.jsonl").open("a") as records:
            records.write(json.dumps({"prompt": f"who is {CANARY}?", "response": f"{CANARY} is here"}) + "\n")
    return file


def test_it_says_what_it_did(finished: Finished) -> None:
    assert "silotune ui" in finished.output
    assert "east" in finished.output
    export = json.loads(silotune("status", str(finished.file), "--json").stdout)["export"]
    assert (Path(export) / "adapter_model.safetensors").is_file()


def test_mlflow_has_one_step_a_round(finished: Finished) -> None:
    uri = finished.federation.tracking.uri.removeprefix("sqlite:///")
    with sqlite3.connect(uri) as db:
        steps = [row[0] for row in db.execute("select step from metrics where key = 'global/loss' order by step")]
    assert steps == [0, 1, 2]


def test_each_round_has_a_page_among_kubeflows_artefacts(finished: Finished) -> None:
    pages = [p.read_text() for p in sorted((finished.federation.work / "runs").glob("*/kfp/**/page"))]
    assert len(pages) == 2
    for number, outgoing in enumerate(finished.globals[1:], start=1):
        (page,) = (p for p in pages if f"round {number}\n" in p)
        assert f"`{outgoing}`" in page
        assert "| east | ok |" in page
    assert CANARY not in "".join(pages)


def test_running_again_is_quick_and_changes_nothing(finished: Finished) -> None:
    store = Path(finished.federation.storage.root)
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    done = silotune("run", str(finished.file))
    assert done.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_cold_interpreters_give_the_same_bytes(finished: Finished, tmp_path: Path, tiny_llama: Path) -> None:
    file = _planted(tmp_path, tiny_llama)
    done = silotune("run", str(file), "--no-warm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert Finished(file, "").globals == finished.globals


# A canary stays in its silo's storage


def needles(home: Path, base: Path) -> dict[str, bytes]:
    """What the canary can look like: as text, and as token ids of the widths in use."""
    from silotune.components.learning.model import load_tokenizer

    ids = load_tokenizer(base)(CANARY, add_special_tokens=False)["input_ids"][1:-1]  # its borders merge with what stands beside
    assert len(ids) >= 8
    found = {"text": CANARY.encode()}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + CANARY.encode())
        found[f"base64 at {shift}"] = coded[4 if shift else 0 : -4]
    return found | {f"int{8 * np.dtype(t).itemsize}": np.array(ids, t).tobytes() for t in ("<i2", "<i4", "<i8")}


def leaks(data: bytes, wanted: dict[str, bytes]) -> set[str]:
    """Which forms of the canary are in some bytes, also within gzip and zip."""
    found = {how for how, needle in wanted.items() if needle in data}
    if data[:2] == b"\x1f\x8b":
        found |= {f"gzip, {how}" for how in leaks(gzip.decompress(data), wanted)}
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found |= {f"zip, {how}" for name in archive.namelist() for how in leaks(archive.read(name), wanted)}
    return found


def outside(finished: Finished) -> Iterator[tuple[Path, bytes]]:
    """Everything that the run wrote but the silo's own storage; and the records themselves, which were there before."""
    root, private = finished.file.parent, Path(finished.federation.silo("east").storage)
    for path in sorted(root.rglob("*")):
        if path.is_file() and private not in path.parents and (root / "data") not in path.parents:
            yield path, path.read_bytes()


def test_a_canary_is_nowhere_outside_its_silo(finished: Finished, tiny_llama: Path) -> None:
    home = Path(finished.federation.silo("east").storage)
    wanted = needles(home, tiny_llama)
    inside = {how for p in home.rglob("*") if p.is_file() for how in leaks(p.read_bytes(), wanted)}
    assert "int32" in inside, "the search must find the canary where it is"
    searched = dict(outside(finished))
    kinds = {p.name for p in searched}
    assert {"commit.json", "events.jsonl", "run.log", "mlflow.db", "executor_output.json", "adapter_model.safetensors"} <= kinds
    found = {str(p): how for p, data in searched.items() if (how := leaks(data, wanted))}
    assert not found
    assert not leaks(finished.output.encode(), wanted)


def test_the_search_finds_a_leak_in_every_channel(finished: Finished, tiny_llama: Path) -> None:
    home = Path(finished.federation.silo("east").storage)
    wanted = needles(home, tiny_llama)
    root = finished.file.parent
    run = next(p for p in (root / ".silotune" / "runs").iterdir())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", b"x" * 50 + CANARY.encode() + b"x" * 50)
    text = f"... {CANARY} ...".encode()
    channels = {
        root / ".silotune" / "store" / "tiny" / "objects" / "leak": b"\0" * 7 + wanted["int32"] + b"\0",
        root / ".silotune" / "store" / "tiny" / "rounds" / "leak.json": json.dumps({"reason": text.decode()}).encode(),
        root / ".silotune" / "store" / "tiny" / "exports" / "leak.zip": packed.getvalue(),
        root / ".silotune" / "mlartifacts" / "leak.gz": gzip.compress(text),
        root / ".silotune" / "leak.db": b"SQLite" + text,
        run / "leak.log": text,
        run / "kfp" / "leak": base64.b64encode(b"ab" + text),
        root / ".silotune-private" / "north" / "leak16": b"\1" + wanted["int16"],
        root / ".silotune-private" / "south" / "leak64": wanted["int64"],
    }
    try:
        for path, data in channels.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        found = {p for p, data in outside(finished) if leaks(data, wanted)}
        assert found == set(channels)
    finally:
        for path in channels:
            path.unlink()


# Interrupted


def start(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SILOTUNE, "run", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def belonging(file: Path) -> list[int]:
    """Processes whose command line or environment names the federation's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"{file.parent}/".encode() in text and b"pytest" not in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def wait_until(what: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(finished: Finished, tmp_path: Path, tiny_llama: Path) -> None:
    file = _planted(tmp_path, tiny_llama)
    run = start(file)
    store = tmp_path / ".silotune" / "store" / "tiny" / "rounds" / "00001"
    assert wait_until((store / "plan.json").exists, 120)
    os.killpg(run.pid, signal.SIGINT)
    output = run.communicate(timeout=30)[0]
    assert run.returncode == 130, output
    assert "silotune run" in output
    assert "Traceback" not in output
    assert wait_until(lambda: not belonging(file)), "processes outlived the run"
    done = silotune("run", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert Finished(file, "").globals == finished.globals
