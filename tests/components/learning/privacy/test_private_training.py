"""Private training as a whole: a step written out by hand, the noise as it arrives in the weights, and what must not be told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silotune.components.learning import model as models
from silotune.components.learning.batches import collate
from silotune.components.learning.checkpoint import Checkpoint
from silotune.components.learning.local_term import LocalTerm
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.learning.privacy.clipping import Clipping
from silotune.components.learning.privacy.noise import Noise
from silotune.components.learning.privacy.private_gradient import Private
from silotune.components.learning.privacy.sampling import sample
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import NonFiniteLoss, Stretch, Trained, token_losses, train, update_of
from silotune.components.terms.training import Training

PAD = 2
KEY = bytes(range(7, 39))
State = dict[str, np.ndarray]


def fresh(folder: Path, method: str = "lora", dropout: float = 0.0) -> Any:
    lora = {"r": 4, "alpha": 8.0, "dropout": dropout, "target_modules": "all-linear"}
    model = models.load_trainable(folder, {"method": method, "dtype": "float32", "lora": lora}, 0)
    rng = np.random.default_rng(11)
    if method == "lora":
        state = models.trainable_state(model)
        models.load_state(model, {n: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in state.items()})
    torch.manual_seed(5)
    return model


def private(z: float = 0.8, clip: float = 0.4, clipping: Clipping = "flat", q: float = 0.4, key: bytes = KEY, steps: int = 2) -> Private:
    quantile = 2.0 if clipping == "adaptive" else None
    return Private(
        Mechanism(sampling_probability=q, noise_multiplier=z, steps=steps, quantile_noise_multiplier=quantile), clip, clipping, key
    )


def run(
    model: Any, shard: Shard, how: Private, rate: float = 1.0, more: dict[str, Any] | None = None, **terms: Any
) -> tuple[State, Trained]:
    training = Training(precision="float32", **({"steps": 2, "batch_size": 4, "accumulation": 2} | terms))
    before = models.trainable_state(model)
    trained = train(model, shard, Stretch(("fed", 17, "north"), 30), training, rate, 64, PAD, private=how, **(more or {}))
    return update_of(before, models.trainable_state(model)), trained


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent instead of AdamW, whose steps hide the scale of the gradient."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr=lr))


def step_by_hand(model: Any, shard: Shard, step: int, how: Private, clip: float, batch: int) -> tuple[State, float]:
    """Sample, one pass a unit, clip, add up, noise, divide: in numpy and float64. Returns the gradient and the next clip."""
    named = models.trainable(model)
    sums, small = {n: np.zeros(p.shape) for n, p in named.items()}, 0.0
    for unit in sample(how.key, step, int(shard.units.max()) + 1, how.mechanism.sampling_probability):
        model.zero_grad()
        own = [int(e) for e in np.flatnonzero(shard.units == unit)]
        losses = torch.cat([token_losses(model, collate(shard, [[e]], PAD)) for e in own])
        losses.mean().backward()
        grads = {n: p.grad.double().numpy() for n, p in named.items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        small += (1.0 if norm <= clip else 0.0) - 0.5
        for n, g in grads.items():
            factor = min(1.0, clip / norm)
            if how.clipping == "automatic":
                factor = clip / (norm + 0.01)
            if how.clipping == "per-layer":
                factor = min(1.0, clip / math.sqrt(len(grads)) / math.sqrt((g**2).sum()))
            sums[n] += g * factor
    noise = Noise(how.key)
    z = how.mechanism.noise_multiplier * clip
    found = {n: (s + z * noise.normals(s.size, "gradient", step, n).reshape(s.shape)) / batch for n, s in sums.items()}
    if how.mechanism.quantile_noise_multiplier:
        b = (small + how.mechanism.quantile_noise_multiplier * float(noise.normals(1, "quantile", step)[0])) / batch
        clip *= math.exp(-0.2 * max(-1.0, min(1.0, b)))
    return found, clip


@pytest.mark.usefixtures("sgd")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("clipping", ["flat", "per-layer", "automatic", "adaptive"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_steps_are_those_written_by_hand(tiny_base: Path, some_shard: Shard, method: str, clipping: Clipping, packing: bool) -> None:
    how, rate = private(clipping=clipping, z=0.3), 0.05
    got, trained = run(fresh(tiny_base, method), some_shard, how, rate, packing=packing)
    model, clip = fresh(tiny_base, method), how.clip
    before = models.trainable_state(model)
    for step in range(2):
        gradient, clip = step_by_hand(model, some_shard, step, how, clip, 4)
        state = models.trainable_state(model)
        models.load_state(model, {n: (state[n] - rate * g).astype(np.float32) for n, g in gradient.items()})
    wanted = update_of(before, models.trainable_state(model))
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-4 * np.abs(wanted[name]).max(), rtol=0, err_msg=name)
    assert trained == Trained(2, 8, 8, None, 38)


@pytest.mark.usefixtures("sgd")
@pytest.mark.parametrize(("z", "clip", "batch"), [(1.0, 0.5, 4), (3.7, 0.02, 2)])
def test_the_noise_in_the_weights_has_its_size(tiny_llama: Path, some_shard: Shard, z: float, clip: float, batch: int) -> None:
    """Two trainings that differ in the noise alone: every unit is drawn, so that the sums are the same."""
    pairs = []
    for i in range(6):
        ways = [private(z=z, clip=clip, q=1.0, key=bytes([i, j]) * 16) for j in (1, 2)]
        one, other = (run(fresh(tiny_llama), some_shard, how, steps=1, batch_size=batch, weight_decay=0.0)[0] for how in ways)
        pairs.append(np.concatenate([(one[n] - other[n]).ravel() for n in one]))
    apart = np.concatenate(pairs).astype(np.float64)
    wanted = 2 * (z * clip / batch) ** 2
    assert abs(apart.mean()) < 4 * math.sqrt(wanted / apart.size)
    assert abs(apart.var() / wanted - 1) < 4 * math.sqrt(2 / apart.size)
    assert 3 * apart.var() ** 2 == pytest.approx((apart**4).mean(), rel=0.1)


@pytest.mark.usefixtures("sgd")
def test_an_empty_sample_is_noise_alone(tiny_llama: Path, some_shard: Shard) -> None:
    key = next(bytes([i]) * 32 for i in range(99) if not len(sample(bytes([i]) * 32, 0, 10, 0.1)))
    got, trained = run(fresh(tiny_llama), some_shard, private(q=0.1, key=key), steps=1, batch_size=1)
    for name, array in got.items():
        noise = 0.8 * 0.4 * Noise(key).normals(array.size, "gradient", 0, name).reshape(array.shape)
        np.testing.assert_allclose(array, -noise, atol=1e-6)
    assert trained.examples == 1


def test_nothing_but_the_weights_depends_on_the_records(tiny_llama: Path, make_shard: Callable[..., Shard]) -> None:
    rng = np.random.default_rng(3)

    def shard(length: int) -> Shard:
        return make_shard([(rng.integers(3, 300, length).tolist(), [0] + [1] * (length - 1)) for _ in range(10)])

    told: list[Any] = []
    found = [run(fresh(tiny_llama), shard(n), private(), 0.01, {"on_step": lambda *said: told.append(said)})[1] for n in (4, 30)]
    assert found[0] == found[1] == Trained(2, 8, 8, None, 38)
    assert told == [(1, 2, None), (2, 2, None)] * 2


@pytest.mark.parametrize(
    ("method", "clipping", "checkpointing"), [("lora", "adaptive", False), ("lora", "flat", True), ("full", "automatic", False)]
)
def test_killed_at_any_step_it_ends_in_the_same_bytes(
    tiny_llama: Path, some_shard: Shard, tmp_path: Path, method: str, clipping: Clipping, checkpointing: bool
) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, *_: Any) -> None:
        if step == at:
            raise Killed

    how, terms = private(clipping=clipping), {"steps": 5, "gradient_checkpointing": checkpointing, "weight_decay": 0.1}
    whole, seen = run(fresh(tiny_llama, method, 0.2), some_shard, how, 1e-2, **terms)
    before = models.trainable_state(fresh(tiny_llama, method))
    for at in (2, 3, 5):
        place = Checkpoint(tmp_path / f"{at}.safetensors", "id", 1)
        with pytest.raises(Killed):
            run(fresh(tiny_llama, method, 0.2), some_shard, how, 1e-2, {"checkpoint": place, "on_step": kill}, **terms)
        model = fresh(tiny_llama, method, 0.2)
        _, again = run(model, some_shard, how, 1e-2, {"checkpoint": place}, **terms)
        assert again == seen
        for name, array in update_of(before, models.trainable_state(model)).items():
            np.testing.assert_array_equal(array, whole[name], err_msg=name)


@pytest.mark.parametrize("other", [{"clip": 0.5}, {"clipping": "automatic"}, {"z": 0.9}])
def test_a_checkpoint_of_other_terms_is_left_alone(tiny_llama: Path, some_shard: Shard, tmp_path: Path, other: dict[str, Any]) -> None:
    place = Checkpoint(tmp_path / "c.safetensors", "id", 1)
    run(fresh(tiny_llama), some_shard, private(), 1e-2, {"checkpoint": place})
    steps: list[int] = []
    run(fresh(tiny_llama), some_shard, private(**other), 1e-2, {"checkpoint": place, "on_step": lambda step, *_: steps.append(step)})
    assert steps == [1, 2]


@pytest.mark.usefixtures("sgd")
def test_dropout_follows_from_the_key_and_from_no_public_seed(tiny_llama: Path, some_shard: Shard) -> None:
    """Masks go by places in a batch: who knew them could tell by all units' gradients whether one more was drawn."""

    def moved(seed: int, key: bytes) -> State:
        model = fresh(tiny_llama, dropout=0.5)
        torch.manual_seed(seed)
        return run(model, some_shard, private(z=1e-4, clip=0.4, q=1.0, key=key), 0.1)[0]

    one, again, other = moved(5, KEY), moved(6, KEY), moved(5, bytes(32))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name], err_msg=name)
    apart = math.sqrt(sum(float(np.sum((one[n] - other[n]) ** 2)) for n in one))
    assert apart > 0.1 * math.sqrt(sum(float(np.sum(one[n] ** 2)) for n in one))  # far more than such noise makes


@pytest.mark.usefixtures("sgd")
def test_the_proximal_term_comes_after_the_noise(tiny_llama: Path, some_shard: Shard) -> None:
    """In the second step it pulls by μ times what the first has moved, whatever the clip."""
    plain, _ = run(fresh(tiny_llama), some_shard, private(), 0.1)
    first, _ = run(fresh(tiny_llama), some_shard, private(), 0.1, steps=1)
    held, _ = run(fresh(tiny_llama), some_shard, private(), 0.1, {"local_term": LocalTerm(mu=2.0)})
    for name in plain:
        np.testing.assert_allclose(held[name], plain[name] - 0.1 * 2.0 * first[name], atol=1e-5)


def test_a_person_counts_once_however_many_records(tiny_llama: Path, some_shard: Shard) -> None:
    """All ten examples of one person are one clipped gradient."""
    alone = replace(some_shard, units=np.zeros(10, np.int32))
    how = private(z=1e-3, clip=0.1, q=1.0)
    captured: dict[str, np.ndarray] = {}

    def note(*_: Any) -> None:
        captured.update({n: p.grad.numpy().copy() for n, p in models.trainable(model).items() if p.grad is not None})

    model = fresh(tiny_llama)
    real = torch.optim.AdamW.step
    try:
        torch.optim.AdamW.step = lambda self, *a, **k: (note(), real(self, *a, **k))[1]  # type: ignore[method-assign]
        run(model, alone, how, 1e-3, steps=1, batch_size=1)
    finally:
        torch.optim.AdamW.step = real  # type: ignore[method-assign]
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in captured.values()))
    assert norm == pytest.approx(0.1, rel=0.01)


def test_weights_that_are_no_numbers_are_told_at_the_end(tiny_llama: Path, some_shard: Shard) -> None:
    with pytest.raises(NonFiniteLoss, match="in the weights that training ended with"):
        run(fresh(tiny_llama), some_shard, private(), 1e30, steps=3, weight_decay=1e7)
