"""Local training against a loop written out by hand, and what must not change its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.learning import model as models
from silotune.components.learning.batches import stream
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import NonFiniteLoss, OutOfMemory, Stretch, Trained, train, update_of
from silotune.components.terms.training import Training

PAD = 2
SEED = ("fed", 17, "north")
State = dict[str, np.ndarray]


def fresh(folder: Path, method: str = "lora", start: float = 0.05) -> Any:
    """A model whose adapters are away from zero, so that A and B both have a gradient."""
    lora = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
    model = models.load_trainable(folder, {"method": method, "dtype": "float32", "lora": lora}, 0)
    rng = np.random.default_rng(11)
    state = models.trainable_state(model)
    if method == "lora":
        models.load_state(model, {n: (a + start * rng.standard_normal(a.shape)).astype(np.float32) for n, a in state.items()})
    return model


def run(model: Any, shard: Shard, cursor: int = 0, peak: float | None = None, **settings: Any) -> tuple[State, Trained]:
    """Train, and give what that added."""
    terms = Training(precision="float32", **{"steps": 2, "batch_size": 4, **settings})
    before = models.trainable_state(model)
    trained = train(model, shard, Stretch(SEED, cursor), terms, peak or terms.learning_rate, 64, PAD)
    return update_of(before, models.trainable_state(model)), trained


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent instead of AdamW, whose steps hide the scale of the gradient."""
    import torch

    def plain(parameters: list[Any], lr: float, weight_decay: float) -> Any:
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", plain)


def close(a: State, b: State, tolerance: float) -> None:
    """Equal but for ``tolerance`` of the largest change."""
    assert a.keys() == b.keys()
    largest = max(float(np.abs(x).max()) for x in b.values())
    assert largest > 0
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=tolerance * largest, rtol=0, err_msg=name)


def step_by_hand(model: Any, shard: Shard, indices: np.ndarray, max_norm: float) -> tuple[float, State, int]:
    """Loss, clipped gradient and tokens of one step: examples one by one, log-softmax and clipping written out."""
    import torch

    named = models.trainable(model)
    model.zero_grad()
    tokens, loss = sum(int(shard.example(i)[1].sum()) for i in indices), 0.0
    for i in indices:
        ids, targets = shard.example(i)
        logits = model(input_ids=torch.tensor([ids.tolist()])).logits[0]
        logs = logits - logits.logsumexp(-1, keepdim=True)
        part = -sum(logs[t - 1, int(ids[t])] for t in range(1, len(ids)) if targets[t]) / tokens
        part.backward()
        loss += float(part.detach())
    gradient = {n: p.grad.double().numpy() for n, p in named.items()}
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    return loss, {n: g * min(1.0, max_norm / norm) for n, g in gradient.items()}, tokens


def adamw_by_hand(
    model: Any, shard: Shard, steps: int, batch: int, rate: float, decay: float, max_norm: float
) -> tuple[State, list[float], int]:
    """Loshchilov & Hutter 2017, arXiv:1711.05101, Algorithm 2, in numpy and float64."""
    before = models.trainable_state(model)
    weights = {n: a.astype(np.float64) for n, a in before.items()}
    m, v = ({n: np.zeros_like(a) for n, a in weights.items()} for _ in range(2))
    losses, tokens = [], 0
    for t in range(1, steps + 1):
        loss, gradient, seen = step_by_hand(model, shard, stream(len(shard), (t - 1) * batch, batch, *SEED), max_norm)
        for n, g in gradient.items():
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g**2
            corrected = (m[n] / (1 - 0.9**t)) / (np.sqrt(v[n] / (1 - 0.999**t)) + 1e-8)
            weights[n] = weights[n] - rate * decay * weights[n] - rate * corrected
        models.load_state(model, {n: a.astype(np.float32) for n, a in weights.items()})
        losses.append(loss * seen)
        tokens += seen
    return update_of(before, models.trainable_state(model)), losses, tokens


# The reference


@pytest.mark.parametrize("method", ["lora", "full"])
def test_steps_are_those_of_a_loop_written_by_hand(tiny_base: Path, some_shard: Shard, method: str) -> None:
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    got, trained = run(fresh(tiny_base, method), some_shard, steps=3, **settings)
    wanted, losses, tokens = adamw_by_hand(fresh(tiny_base, method), some_shard, 3, 4, 1e-2, 0.1, 0.5)
    # AdamW divides by the size of a gradient, however close to nothing it is: a few weights magnify rounding.
    apart = np.concatenate([np.abs(got[n] - wanted[n]).ravel() for n in wanted]) / 1e-2
    assert np.quantile(apart, 0.99) < 2e-3
    assert apart.mean() < 1e-3
    assert trained == Trained(3, 12, tokens, pytest.approx(sum(losses) / tokens, abs=1e-5), 12)


@pytest.mark.usefixtures("sgd")
def test_gradient_is_the_mean_over_target_tokens(tiny_base: Path, some_shard: Shard) -> None:
    _, gradient, _ = step_by_hand(fresh(tiny_base), some_shard, stream(10, 30, 4, *SEED), 1e9)
    got, trained = run(fresh(tiny_base), some_shard, cursor=30, steps=1, learning_rate=0.01, max_grad_norm=1e9)
    close(got, {n: -0.01 * g for n, g in gradient.items()}, 1e-4)
    assert trained.cursor == 34


# What changes speed and memory only


@pytest.mark.usefixtures("sgd")
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "accumulation": 1},
        {"packing": True, "accumulation": 2},
        {"packing": False, "accumulation": 3},
        {"packing": False, "accumulation": 99},
    ],
)
def test_packing_and_accumulation_do_not_change_the_result(tiny_base: Path, some_shard: Shard, settings: dict[str, Any]) -> None:
    common = {"batch_size": 7, "learning_rate": 0.1, "max_grad_norm": 1e9}
    plain, first = run(fresh(tiny_base), some_shard, packing=False, **common)
    other, second = run(fresh(tiny_base), some_shard, **common, **settings)
    close(other, plain, 1e-4)
    assert second.loss == pytest.approx(first.loss, abs=1e-5)
    assert (second.examples, second.tokens) == (first.examples, first.tokens)


@pytest.mark.usefixtures("sgd")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny_llama: Path, some_shard: Shard, method: str) -> None:
    calls, updates = [], []
    for on in (False, True):
        model = fresh(tiny_llama, method)
        seen: list[int] = []
        model.get_submodule("base_model.model.model" if method == "lora" else "model").layers[1].input_layernorm.register_forward_hook(
            lambda layer, *_, seen=seen: seen.extend([1] * layer.training)  # not whether it keeps examples apart
        )
        updates.append(run(model, some_shard, gradient_checkpointing=on, learning_rate=0.1, accumulation=2)[0])
        calls.append(len(seen))
    close(updates[1], updates[0], 1e-5)
    assert calls[1] == 2 * calls[0]


def test_same_inputs_same_bytes(tiny_llama: Path, some_shard: Shard) -> None:
    import torch

    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state, trained = run(fresh(tiny_llama), some_shard, steps=3)
        runs.append(({n: a.tobytes() for n, a in state.items()}, trained))
    assert runs[0] == runs[1]


def test_next_round_goes_on_where_the_last_one_stopped(tiny_llama: Path, some_shard: Shard) -> None:
    """With fresh optimiser state and no momentum, 2 + 2 steps see the same examples as 4."""
    whole = run(fresh(tiny_llama), some_shard, steps=4)[1]
    first = run(fresh(tiny_llama), some_shard, steps=2)[1]
    second = run(fresh(tiny_llama), some_shard, cursor=first.cursor, steps=2)[1]
    assert (first.cursor, second.cursor) == (8, 16) == (8, whole.cursor)
    assert first.tokens + second.tokens == whole.tokens


# Clipping, rates, running away


@pytest.mark.usefixtures("sgd")
def test_gradient_is_clipped_to_the_norm(tiny_llama: Path, some_shard: Shard) -> None:
    def norm(state: State) -> float:
        return float(np.sqrt(sum(np.square(a, dtype=np.float64).sum() for a in state.values())))

    free, _ = run(fresh(tiny_llama), some_shard, steps=1, learning_rate=1.0, max_grad_norm=1e9)
    clipped, _ = run(fresh(tiny_llama), some_shard, steps=1, learning_rate=1.0, max_grad_norm=0.01)
    above, _ = run(fresh(tiny_llama), some_shard, steps=1, learning_rate=1.0, max_grad_norm=norm(free) * 1.01)
    assert norm(free) > 0.1
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)
    close({n: a * (norm(free) / 0.01) for n, a in clipped.items()}, free, 1e-3)
    close(above, free, 1e-6)


def test_rates_of_the_steps(tiny_llama: Path, some_shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def __init__(self, parameters: list[Any], lr: float, weight_decay: float) -> None:
            super().__init__(parameters, lr=lr)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    run(fresh(tiny_llama), some_shard, peak=0.8, learning_rate=5.0, steps=6, schedule="linear", warmup_steps=2, batch_size=1)
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.6, 0.4, 0.2])


def test_loss_falls_when_one_example_is_learned_by_heart(tiny_base: Path, make_shard: Callable[..., Shard]) -> None:
    shard = make_shard([([0, 40, 90, 17, 250, 33, 1], [0, 0, 0, 1, 1, 1, 1])])
    losses: list[float] = []
    terms = Training(steps=40, batch_size=1, learning_rate=0.01, precision="float32")
    told: list[tuple[int, int]] = []

    def on_step(done: int, steps: int, loss: float) -> None:
        told.append((done, steps))
        losses.append(loss)

    trained = train(fresh(tiny_base, "full"), shard, Stretch(SEED, 0), terms, 0.01, 64, PAD, on_step)
    assert losses[0] > 3
    assert losses[-1] < 0.1
    assert told == [(i, 40) for i in range(1, 41)]
    assert trained.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_frozen_weights_stay_as_they_are(tiny_llama: Path, some_shard: Shard) -> None:
    model = fresh(tiny_llama)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    run(model, some_shard)
    assert frozen
    assert all((dict(model.named_parameters())[n] == p).all() for n, p in frozen.items())


def test_not_a_number_is_told_with_its_step(tiny_llama: Path, some_shard: Shard) -> None:
    model = fresh(tiny_llama)
    state = models.trainable_state(model)
    name = next(iter(state))
    state[name][0, 0] = np.nan
    models.load_state(model, state)
    with pytest.raises(NonFiniteLoss, match=r"non-finite loss at step 1 of 2; lower training.learning_rate") as caught:
        run(model, some_shard)
    assert caught.value.reason == "non-finite loss at step 1 of 2"


def test_running_away_is_told_with_its_step(tiny_llama: Path, some_shard: Shard) -> None:
    with pytest.raises(NonFiniteLoss, match="non-finite loss at step 2 of 5"):
        run(fresh(tiny_llama), some_shard, steps=5, learning_rate=1e30)


# Out of memory


def test_step_that_does_not_fit_into_memory_names_the_cure(tiny_llama: Path, some_shard: Shard) -> None:
    """torch's own allocator is asked for a petabyte in the middle of a step."""
    import torch

    model = fresh(tiny_llama)
    model.register_forward_hook(lambda *_: torch.empty(1 << 50, dtype=torch.uint8))
    with pytest.raises(OutOfMemory, match=r"batch_size 4 in 2 part.* without gradient_checkpointing; lower training.batch_size") as caught:
        run(model, some_shard, accumulation=2)
    assert caught.value.reason == "out of memory"
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("error", "known"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')", True),
        ("RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.')", True),
        ("RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')", True),
        ("MemoryError()", True),
        ("RuntimeError('mat1 and mat2 shapes cannot be multiplied')", False),
    ],
)
def test_memory_is_told_from_other_trouble(tiny_llama: Path, some_shard: Shard, error: str, known: bool) -> None:
    import torch

    model = fresh(tiny_llama)
    raised = eval(error, {"torch": torch})

    def fail(*_: Any) -> None:
        raise raised

    model.register_forward_hook(fail)
    with pytest.raises(OutOfMemory if known else RuntimeError) as caught:
        run(model, some_shard)
    assert (caught.value is raised) != known
