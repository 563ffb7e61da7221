"""Checkpoints: a training that dies at any moment, however often, ends in the bytes of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.learning import model as models
from silotune.components.learning.checkpoint import Checkpoint, NotSaved, Seen, load, save
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import Stretch, Trained, train
from silotune.components.terms.training import Training

STEPS = 6
TERMS = {"steps": STEPS, "batch_size": 3, "learning_rate": 1e-2, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2}
Ending = tuple[dict[str, bytes], Trained]


class Job:
    """One training that can be started as often as one likes, each time from the same weights and random numbers."""

    def __init__(self, base: Path, shard: Shard, path: Path, method: str = "lora", **terms: Any) -> None:
        self.base, self.shard, self.path, self.method = base, shard, path, method
        self.terms = Training(precision="float32", **{**TERMS, **terms})

    def start(self, every: int = 1, identity: str = "round 1", dropout: float = 0.2, **more: Any) -> Ending:
        import torch

        lora = {"r": 4, "alpha": 8.0, "dropout": dropout, "target_modules": "all-linear"}
        model = models.load_trainable(self.base, {"method": self.method, "dtype": "float32", "lora": lora}, 0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout  # of a GPT-2 trained as a whole, too
        torch.manual_seed(5)
        place = Checkpoint(self.path, identity, every)
        trained = train(
            model, self.shard, Stretch(("fed", 17, "north"), 4), self.terms, self.terms.learning_rate, 64, 2, checkpoint=place, **more
        )
        return {n: a.tobytes() for n, a in models.trainable_state(model).items()}, trained

    def undisturbed(self) -> Ending:
        return self.start(every=0)

    def resumed(self, **more: Any) -> tuple[Ending, list[int]]:
        """The ending, and the steps that it took in this start."""
        told: list[int] = []
        return self.start(on_step=lambda done, *_: told.append(done), **more), told

    def in_child(self, before: Callable[[], None] = lambda: None, **more: Any) -> int:
        """Start in a forked process; its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                before()
                self.start(**more)
                os._exit(0)
            finally:
                os._exit(1)
        return pid


def ended(pid: int) -> int:
    """Exit code, or minus the signal that killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(step: int) -> Callable[[int, int, float], None]:
    def on_step(done: int, steps: int, loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


@pytest.fixture
def job(tiny_llama: Path, some_shard: Shard, tmp_path: Path) -> Job:
    return Job(tiny_llama, some_shard, tmp_path / "silo" / "checkpoint")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    """The silo's own folder."""
    (tmp_path / "silo").mkdir()
    return tmp_path / "silo"


# Killed


@pytest.mark.parametrize(
    ("base", "method", "terms"),
    [
        ("tiny_llama", "lora", {}),
        ("tiny_llama", "full", {"accumulation": 2}),
        ("tiny_gpt2", "lora", {"accumulation": 3, "packing": False}),
        ("tiny_gpt2", "full", {"gradient_checkpointing": True}),
    ],
)
@pytest.mark.parametrize(("every", "killed", "first"), [(1, 1, 1), (1, 5, 5), (2, 5, 5), (4, 6, 5)])
def test_training_killed_at_a_step_ends_in_the_same_bytes(
    request: pytest.FixtureRequest, some_shard: Shard, folder: Path, base: str, method: str, terms: dict[str, Any], every: int,
    killed: int, first: int,
) -> None:  # fmt: skip
    job = Job(request.getfixturevalue(base), some_shard, folder / "checkpoint", method, **terms)
    assert ended(job.in_child(every=every, on_step=kill_at(killed))) == -signal.SIGKILL
    again, told = job.resumed(every=every)
    assert told == list(range(first, STEPS + 1))
    assert again == job.undisturbed()


def test_dropout_would_differ_without_the_random_numbers(job: Job) -> None:
    """What the tests here can see: the masks of dropout are another at every step, and matter."""
    import torch

    ending = job.undisturbed()
    assert ending != job.start(every=0, dropout=0.0)
    assert ending != job.start(every=0, on_step=lambda done, *_: torch.manual_seed(5))


@pytest.mark.parametrize(("moment", "first"), [("save_file", 3), ("fsync", 3), ("replace", 3), ("after", 4)])
def test_training_killed_while_it_writes_keeps_a_whole_checkpoint(job: Job, folder: Path, moment: str, first: int) -> None:
    """At the third checkpoint: before, in the middle of and right after the renaming."""

    def die_there() -> None:
        import safetensors.torch

        module: Any = {"save_file": safetensors.torch, "fsync": os, "replace": Path, "after": Path}[moment]
        name = "replace" if moment == "after" else moment
        real, calls = getattr(module, name), []

        def deadly(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            due = len(calls) == (5 if moment == "fsync" else 3)  # the file, then its folder
            if due and moment == "after":
                real(*args, **kwargs)
            elif due and moment == "save_file":  # half of it
                Path(args[1]).write_bytes(b"\0" * 1000)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(module, name, deadly)

    assert ended(job.in_child(die_there)) == -signal.SIGKILL
    again, told = job.resumed()
    assert told[0] == first
    assert again == job.undisturbed()
    assert [p.name for p in folder.iterdir()] == ["checkpoint"]


def test_training_killed_again_and_again_at_any_moment(tiny_llama: Path, some_shard: Shard, folder: Path) -> None:
    job = Job(tiny_llama, some_shard, folder / "checkpoint", steps=30)
    began = time.monotonic()
    job.undisturbed()
    whole = time.monotonic() - began
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "big"))
    kills, code = 0, 1
    while code != 0:
        pid = job.in_child()
        time.sleep(whole * float(rng.uniform(0.2, 0.7 + 0.1 * kills)))
        os.kill(pid, signal.SIGKILL)  # a child that is done waits to be waited for
        code = ended(pid)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills > 0
    assert job.start() == job.undisturbed()


@pytest.mark.slow
def test_new_interpreter_ends_in_the_same_bytes(job: Job, some_shard: Shard, folder: Path) -> None:
    """Nothing of the dead process's memory is needed: a checkpoint written here, finished by another program."""
    np.savez(folder / "shard.npz", tokens=some_shard.tokens, targets=some_shard.targets, offsets=some_shard.offsets)
    ended(job.in_child(on_step=kill_at(4)))
    code = f"""
import importlib.util, json, sys
from pathlib import Path
import numpy as np
from silotune.components.learning.tokens import Counts, Shard
spec = importlib.util.spec_from_file_location("test_checkpoint", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
folder = Path({str(folder)!r})
loaded = np.load(folder / "shard.npz")
shard = Shard(loaded["tokens"], loaded["targets"], loaded["offsets"], "digest", Counts(1, 1, 1, 1, 0, 0), np.arange(len(loaded["offsets"]) - 1))
(state, trained), told = module.Job(Path({str(job.base)!r}), shard, folder / "checkpoint").resumed()
print(json.dumps([told, trained.loss.hex(), {{n: data.hex() for n, data in state.items()}}]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
    told, loss, state = json.loads(out.splitlines()[-1])
    wanted, trained = job.undisturbed()
    assert told == [4, 5, 6]
    assert ({n: bytes.fromhex(data) for n, data in state.items()}, loss) == (wanted, trained.loss.hex())


# Stopped


def test_stopped_training_says_what_it_has_done_and_goes_on_later(job: Job) -> None:
    asked: list[tuple[int, float]] = []

    def stop(done: int, slowest: float) -> bool:
        asked.append((done, slowest))
        return done == 2

    began = time.monotonic()
    _, part = job.start(every=100, stop=stop)
    assert [done for done, _ in asked] == [1, 2]
    assert 0 < asked[0][1] <= asked[1][1] < time.monotonic() - began
    assert (part.steps, part.examples, part.cursor) == (2, 6, 10)
    whole = job.undisturbed()
    assert part.tokens < whole[1].tokens
    again, told = job.resumed(every=100)
    assert told == [3, 4, 5, 6]
    assert again == whole


def test_stopping_after_every_step_changes_nothing(job: Job) -> None:
    for done in range(1, STEPS + 1):
        ending = job.start(stop=lambda *_: True)
        assert ending[1].steps == done
    assert ending == job.undisturbed() == job.start(stop=lambda *_: True)


def test_stopped_training_has_the_weights_of_its_steps(job: Job) -> None:
    """The rate's course is that of all steps: four of six are not four of four."""
    stopped = [job.start(every=every, stop=lambda done, _: done == 4) for every in (0, 3)]
    assert stopped[0] == stopped[1]
    of_four = Job(job.base, job.shard, job.path, steps=4).undisturbed()
    assert (stopped[0][1].steps, stopped[0][1].tokens) == (4, of_four[1].tokens)
    assert stopped[0][0] != of_four[0]


def test_slowest_step_is_told(job: Job) -> None:
    told: list[float] = []
    job.start(
        every=0,
        on_step=lambda done, *_: time.sleep(0.3 if done == 3 else 0.0),
        stop=lambda _, slowest: told.append(slowest) or False,  # type: ignore[func-returns-value]
    )
    assert max(told[:2]) < 0.3 <= told[2] == told[5]


def test_finished_training_is_not_done_again(job: Job) -> None:
    ending = job.start()
    assert job.resumed() == (ending, [])


# Of another training, or none


def test_checkpoint_of_another_training_is_no_checkpoint(job: Job, tiny_llama: Path, some_shard: Shard) -> None:
    whole = job.undisturbed()
    job.start(stop=lambda done, _: done == 3)
    assert job.resumed(identity="round 2") == (whole, [1, 2, 3, 4, 5, 6])
    job.start(identity="round 3", stop=lambda done, _: done == 3)
    faster = Job(tiny_llama, some_shard, job.path, learning_rate=2e-2)
    assert faster.resumed(identity="round 3") == (faster.undisturbed(), [1, 2, 3, 4, 5, 6])


def test_checkpoint_that_does_not_fit_the_model_is_no_checkpoint(job: Job, tiny_llama: Path, some_shard: Shard) -> None:
    job.start(stop=lambda done, _: done == 3)
    full = Job(tiny_llama, some_shard, job.path, "full")
    assert full.resumed() == (full.undisturbed(), [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("every", [0, 100])
def test_nothing_is_written_before_it_is_due(job: Job, folder: Path, every: int) -> None:
    job.start(every=every)
    assert list(folder.iterdir()) == []
    job.start(every=every, stop=lambda *_: True)
    assert len(list(folder.iterdir())) == (every > 0)


def test_one_file_per_training_for_its_owner_only(job: Job, folder: Path) -> None:
    old = os.umask(0)
    try:
        job.start()
    finally:
        os.umask(old)
    assert [p.name for p in folder.iterdir()] == ["checkpoint"]
    assert job.path.stat().st_mode & 0o777 == 0o600


def test_file_is_json_and_tensors_end_to_end_and_nothing_else(job: Job) -> None:
    state, trained = job.start()
    data = job.path.read_bytes()
    assert not zipfile.is_zipfile(job.path)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    seen = json.loads(header.pop("__metadata__")["seen"])
    spans = sorted(about["data_offsets"] for about in header.values())
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
    assert spans[-1][1] == len(data) - 8 - length
    kinds = {name.rsplit("/", 1)[0] if name.startswith("optimizer") else name.split("/")[0] for name in header}
    assert kinds == {"weight", "random", "optimizer/step", "optimizer/exp_avg", "optimizer/exp_avg_sq"}
    assert sum(name.startswith("weight/") for name in header) == len(state)
    assert (seen["steps"], seen["examples"], seen["tokens"], seen["cursor"]) == (6, 18, trained.tokens, 22)
    assert float.fromhex(seen["loss_sum"]) / trained.tokens == trained.loss


# Damaged


@pytest.fixture
def small(folder: Path) -> Checkpoint:
    import torch

    place = Checkpoint(folder / "small", "me", 1)
    tensors = {"weight/a": torch.arange(6.0).reshape(2, 3), "random/cpu": torch.arange(5, dtype=torch.uint8), "s": torch.tensor(2.5)}
    save(place, Seen(3, 4, 5, 0.1 + 0.2, 7), {**tensors, "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, 3)})
    return place


def test_what_is_saved_is_loaded(small: Checkpoint) -> None:
    import torch

    found = load(small)
    assert found is not None
    assert found[0] == Seen(3, 4, 5, 0.1 + 0.2, 7)
    assert found[1]["weight/a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (found[1]["half"].dtype, found[1]["none"].shape, float(found[1]["s"])) == (torch.bfloat16, (0, 3), 2.5)


@pytest.mark.filterwarnings("ignore:checkpoint:RuntimeWarning")
@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_no_flipped_byte_goes_unseen(small: Checkpoint, flip: int) -> None:
    good = small.path.read_bytes()
    for at in range(len(good)):
        small.path.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
        assert load(small) is None, at
    small.path.write_bytes(good)
    assert load(small) is not None


@pytest.mark.filterwarnings("ignore:checkpoint:RuntimeWarning")
def test_no_missing_or_added_byte_goes_unseen(small: Checkpoint) -> None:
    good = small.path.read_bytes()
    for data in [*(good[:size] for size in range(len(good))), good + b"\0", b"\x80\x04N.", b"\xff" * 5000]:
        small.path.write_bytes(data)
        assert load(small) is None
        assert not small.path.exists()


@pytest.mark.parametrize("where", ["length", "header", "identity", "digest", "weight", "end", "cut", "empty"])
def test_damaged_checkpoint_starts_training_over(job: Job, where: str) -> None:
    job.start(stop=lambda done, _: done == 3)
    data = bytearray(job.path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    keep = {"cut": len(data) // 2, "empty": 0}.get(where, len(data))
    at = {"length": 1, "header": data.index(b"F32"), "identity": data.index(b"identity") + 20, "digest": data.index(b"sha256") + 12,
          "weight": (start + len(data)) // 2}.get(where, len(data) - 1)  # fmt: skip
    data[at] ^= 1
    job.path.write_bytes(data[:keep])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again, told = job.resumed()
    texts = [str(w.message) for w in said if "checkpoint" in str(w.message)]
    other = where == "identity"  # for all one can tell, another training's
    assert texts == ([] if other else [f"checkpoint '{job.path}': is damaged and was removed; training starts over"])
    assert told == [1, 2, 3, 4, 5, 6]
    assert again == job.undisturbed()


# No room


def test_training_goes_on_where_the_disk_is_full_and_says_so_once(job: Job, folder: Path) -> None:
    """No file may grow over 20 000 bytes: what a write past the end of a disk or a quota answers."""
    job.start(stop=lambda done, _: done == 1)
    first = job.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again, told = job.resumed()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    texts = [str(w.message) for w in said if "checkpoint" in str(w.message)]
    assert len(texts) == 1
    assert texts[0].startswith(f"checkpoint '{job.path}': must be writable, got: ")
    assert "File too large" in texts[0]
    assert texts[0].endswith("; free space or allow writing there; training goes on without")
    assert told == [2, 3, 4, 5, 6]
    assert again == job.undisturbed()
    assert [p.name for p in folder.iterdir()] == ["checkpoint"]
    assert job.path.read_bytes() == first  # a killed training would resume from there


def test_place_that_cannot_be_written_is_named(folder: Path) -> None:
    import torch

    with pytest.raises(NotSaved, match=r"'.*/none/checkpoint': must be writable, got: No such file or directory") as caught:
        save(Checkpoint(folder / "none" / "checkpoint", "me", 1), Seen(1, 1, 1, 1.0, 1), {"a": torch.ones(1)})
    assert caught.value.reason == "checkpoint not written"
