"""Several processes train as one does, to rounding; the same number of them the same bytes; and none goes on without the others."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.learning import model as models
from silotune.components.learning.batches import batches, pack, stream, target_count
from silotune.components.learning.checkpoint import Checkpoint
from silotune.components.learning.evaluation import evaluate
from silotune.components.learning.local_term import LocalTerm
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.learning.privacy.private_gradient import Private
from silotune.components.learning.ranks import ALONE, RankLost, Ranks, RanksDiffer, joined
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import NonFiniteLoss, OutOfMemory, Stretch, train
from silotune.components.process.nodes import Layout, Table
from silotune.components.terms.training import Training

SEED = ("fed", 17, "north")
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
Work = Callable[[Ranks], Any]


class Together:
    """Forked processes that do the same work as ranks of one training."""

    def __init__(self, size: int, work: Work) -> None:
        self.table = Table.kept(Layout(1, size), {})
        self.pipes, self.pids = [], []
        gate, opener = os.pipe()  # a fork while the table's thread answers another rank could inherit a lock of glibc's that nobody opens
        for rank in range(size):
            ours, theirs = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                    os.close(opener)
                    os.read(gate, 1)
                    said = self._said(rank, size, work)
                    with os.fdopen(theirs, "w") as pipe:
                        pipe.write(json.dumps(said))
                finally:
                    os._exit(0)
            os.close(theirs)
            self.pipes.append(ours)
            self.pids.append(pid)
        os.close(opener)
        os.close(gate)

    def _said(self, rank: int, size: int, work: Work) -> Any:
        try:
            with joined(rank, size, "127.0.0.1", self.table.port) as ranks:
                said = work(ranks)
                ranks.leave()
            return said
        except (RankLost, RanksDiffer, OutOfMemory, NonFiniteLoss) as error:
            return error.reason

    def results(self) -> list[Any]:
        """What each rank's work returned, the reason of its error, or None where it was killed."""
        found = []
        for pipe, pid in zip(self.pipes, self.pids, strict=True):
            with os.fdopen(pipe) as stream_:
                text = stream_.read()
            os.waitpid(pid, 0)
            found.append(json.loads(text) if text else None)
        return found


def together(size: int, work: Work) -> list[Any]:
    return [work(ALONE)] if size == 1 else Together(size, work).results()


def training_of(base: Path, shard: Shard, method: str = "lora", dropout: float = 0.0, place: Path | None = None, **more: Any) -> Work:
    """Work that trains, and gives (numbers seen, weights)."""
    options = {name: more.pop(name) for name in ("on_step", "stop") if name in more}
    how = more.pop("private", None)
    terms = Training(precision="float32", **{"steps": 3, "batch_size": 5, "learning_rate": 1e-2, **more})

    def work(ranks: Ranks) -> Any:
        import torch

        lora = LORA | {"dropout": dropout}
        model = models.load_trainable(base, {"method": method, "dtype": "float32", "lora": lora}, 0)
        torch.manual_seed(5)
        given = {name: (lambda *a, f=f: f(ranks, model, *a)) for name, f in options.items()}
        checkpoint = Checkpoint(place, "round 1", 2) if place else None
        seen = train(
            model, shard, Stretch(SEED, 4), terms, terms.learning_rate, 64, 2, checkpoint=checkpoint, ranks=ranks, private=how, **given
        )
        numbers = [seen.steps, seen.examples, seen.tokens, None if seen.loss is None else seen.loss.hex(), seen.cursor]
        return numbers, {n: a.tobytes().hex() for n, a in models.trainable_state(model).items()}

    return work


def weights(result: Any) -> np.ndarray:
    return np.concatenate([np.frombuffer(bytes.fromhex(result[1][name]), np.float32) for name in sorted(result[1])])


# The same training, whoever does it


def test_a_local_term_is_added_to_the_sum_of_all_ranks_gradients(tiny_llama: Path, some_shard: Shard) -> None:
    """Once, not once for each; and the mean of raw gradients is that of the whole batch, in every rank."""
    state = models.initial_state(tiny_llama, {"method": "lora", "dtype": "float32", "lora": LORA}, 0)
    rng = np.random.default_rng(2)
    term = LocalTerm(0.3, {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in state.items()}, observe=True)

    def work(ranks: Ranks) -> Any:
        model = models.load_trainable(tiny_llama, {"method": "lora", "dtype": "float32", "lora": LORA}, 0)
        terms = Training(precision="float32", steps=3, batch_size=5, learning_rate=1e-2)
        found = train(model, some_shard, Stretch(SEED, 4), terms, 1e-2, 64, 2, ranks=ranks, local_term=term)
        return [{n: a.astype(float).tolist() for n, a in sorted(x.items())} for x in (found.gradient, models.trainable_state(model))]

    alone, (first, second) = work(ALONE), together(2, work)
    assert first == second
    for one, other, least in zip(alone, first, (0.01, 0.001), strict=True):
        flat = [np.concatenate([np.ravel(a) for a in x.values()]) for x in (one, other)]
        np.testing.assert_allclose(flat[1], flat[0], atol=1e-4)
        assert np.abs(flat[0]).max() > least


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("lora", {}),
        ("full", {"accumulation": 3, "packing": False, "batch_size": 7}),
        ("lora", {"batch_size": 1}),  # of three ranks two have nothing to do
    ],
)
def test_more_processes_train_the_same_model(tiny_llama: Path, some_shard: Shard, method: str, terms: dict[str, Any]) -> None:
    work = training_of(tiny_llama, some_shard, method, weight_decay=0.1, **terms)
    (alone,) = together(1, work)
    start = models.load_trainable(tiny_llama, {"method": method, "dtype": "float32", "lora": LORA}, 0)
    moved = weights(alone) - np.concatenate([a.ravel() for _, a in sorted(models.trainable_state(start).items())])
    assert np.abs(moved).mean() > 1e-4
    for size in (2, 3):
        several = together(size, work)
        assert all(other == several[0] for other in several), "all ranks hold the same bytes and have counted the same"
        (_, examples, tokens, loss, cursor), (_, *numbers) = several[0][0], alone[0]
        assert [examples, tokens, cursor] == [numbers[0], numbers[1], numbers[3]]
        assert float.fromhex(loss) == pytest.approx(float.fromhex(numbers[2]), rel=1e-5)
        # AdamW divides by the size of a gradient, however close to nothing it is: a few weights magnify rounding.
        apart = np.abs(weights(several[0]) - weights(alone))
        assert np.quantile(apart, 0.99) < 1e-2 * 1e-2
        assert apart.mean() < 1e-2 * 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_private_processes_draw_and_noise_as_one(tiny_llama: Path, some_shard: Shard, method: str) -> None:
    mechanism = Mechanism(sampling_probability=0.7, noise_multiplier=0.8, quantile_noise_multiplier=2.0, steps=3)
    how = Private(mechanism, 0.4, "adaptive", bytes(range(32)))
    work = training_of(tiny_llama, some_shard, method, private=how, batch_size=7, accumulation=4)
    one, *both = work(ALONE), *together(2, work)
    assert both[0] == both[1]
    assert both[0][0] == one[0] == [3, 21, 21, None, 25]
    np.testing.assert_allclose(weights(both[0]), weights(one), atol=1e-3)  # steps of 1e-2
    assert np.quantile(np.abs(weights(both[0]) - weights(one)), 0.99) < 1e-4


def test_again_with_as_many_processes_the_same_bytes(tiny_llama: Path, some_shard: Shard) -> None:
    work = training_of(tiny_llama, some_shard, dropout=0.2, accumulation=2)
    assert together(2, work) == together(2, work)
    assert together(3, work)[0] == together(3, work)[2]


def test_dropout_differs_between_ranks_and_steps(tiny_llama: Path, some_shard: Shard) -> None:
    drawn = together(2, training_of(tiny_llama, some_shard, dropout=0.2, on_step=lambda ranks, *_: note(ranks)))
    assert drawn[0] == drawn[1]
    seen = together(2, lambda ranks: draws(tiny_llama, some_shard, ranks))
    assert len({*map(str, seen[0]), *map(str, seen[1])}) == 6


def note(ranks: Ranks) -> None:
    """A rank that draws more random numbers than another changes nothing."""
    import torch

    torch.rand(1 + ranks.rank)


def draws(base: Path, shard: Shard, ranks: Ranks) -> list[float]:
    """A random number after each step."""
    import torch

    found: list[float] = []
    training_of(base, shard, dropout=0.2, on_step=lambda *_: found.append(float(torch.rand(1))))(ranks)
    return found


def test_every_row_is_of_one_rank_and_no_batch_grows(some_shard: Shard) -> None:
    indices = stream(len(some_shard), 0, 10, *SEED)
    for packing in (False, True):
        capacity = 40 if packing else 0
        rows = len(pack(some_shard.lengths(indices), capacity))
        for parts in (1, 2, 3, 7):
            most = max(b.input_ids.shape[0] for b in batches(some_shard, indices, parts, 40, 2, packing))
            for size in (1, 2, 3, 4, 12):
                shares = [list(batches(some_shard, indices, parts, 40, 2, packing, (rank, size))) for rank in range(size)]
                assert sum(b.input_ids.shape[0] for share in shares for b in share) == rows
                assert sum(b.tokens for share in shares for b in share) == target_count(some_shard, indices)
                assert max(b.input_ids.shape[0] for share in shares for b in share) <= most
                assert max(len(share) for share in shares) <= -(-parts // size)


def test_all_ranks_score_together(tiny_llama: Path, some_shard: Shard) -> None:
    def work(ranks: Ranks) -> Any:
        model = models.load_base(tiny_llama, "float32")
        score = evaluate(model, some_shard, np.arange(10), 3, 64, 2, ranks=ranks)
        return [score.examples, score.tokens, score.correct, score.loss_sum]

    (alone,) = together(1, work)
    several = together(3, work)
    assert several[0] == several[1] == several[2]
    assert several[0][:3] == alone[:3]
    assert several[0][3] == pytest.approx(alone[3], rel=1e-12)


# Stopping and going on


def test_a_training_goes_on_from_its_checkpoint_in_the_same_bytes(tiny_llama: Path, some_shard: Shard, tmp_path: Path) -> None:
    def kill(ranks: Ranks, model: Any, done: int, *_: Any) -> None:
        if ranks.rank == 1 and done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    terms = {"steps": 5, "dropout": 0.2, "schedule": "cosine"}
    undisturbed = together(2, training_of(tiny_llama, some_shard, **terms))
    place = tmp_path / "checkpoint"
    began = time.monotonic()
    assert together(2, training_of(tiny_llama, some_shard, place=place, on_step=kill, **terms)) == [RankLost.REASON, None]
    assert time.monotonic() - began < 20
    told: list[int] = []

    def resumed(ranks: Ranks) -> Any:
        result = training_of(tiny_llama, some_shard, place=place, on_step=lambda r, m, done, *_: told.append(done), **terms)(ranks)
        return [told, *result]

    first, second = together(2, resumed)
    assert first[0] == second[0] == [3, 4, 5]
    assert first[1:] == second[1:] == undisturbed[0]


def test_rank_0_stops_all_at_the_same_step(tiny_llama: Path, some_shard: Shard, tmp_path: Path) -> None:
    def stop(ranks: Ranks, model: Any, steps: int, slowest: float) -> bool:
        return steps >= (2 if ranks.rank == 0 else 1)

    first, second = together(2, training_of(tiny_llama, some_shard, steps=4, stop=stop, place=tmp_path / "checkpoint"))
    assert first == second
    assert first[0][0] == 2
    (alone,) = together(1, training_of(tiny_llama, some_shard, steps=4, place=tmp_path / "checkpoint"))
    assert alone[0][:2] == [4, 20], "one process goes on from the checkpoint of two"


# Failing


def test_ranks_that_differ_are_an_error(tiny_llama: Path, some_shard: Shard) -> None:
    def change(ranks: Ranks, model: Any, done: int, *_: Any) -> None:
        import torch

        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-6 * ranks.rank

    assert together(2, training_of(tiny_llama, some_shard, on_step=change)) == ["processes diverged"] * 2


def test_memory_that_ends_on_one_rank_is_told_by_that_one(tiny_llama: Path, some_shard: Shard) -> None:
    def fill(ranks: Ranks, model: Any, done: int, *_: Any) -> None:
        import torch

        if ranks.rank == 1:
            torch.empty(1 << 50, dtype=torch.uint8)

    assert together(2, training_of(tiny_llama, some_shard, on_step=fill)) == [RankLost.REASON, "out of memory"]


def test_a_loss_that_is_no_number_on_one_rank_ends_all(tiny_llama: Path, some_shard: Shard) -> None:
    def spoiled(ranks: Ranks, model: Any, done: int, *_: Any) -> None:
        if ranks.rank == 1:

            def hook(module: Any, given: Any, out: Any) -> Any:
                out.logits = out.logits * float("nan")
                return out

            model.register_forward_hook(hook)

    assert together(2, training_of(tiny_llama, some_shard, packing=False, on_step=spoiled)) == ["non-finite loss at step 2 of 3"] * 2
