"""Local terms: what is added to the gradients, and that a training with them can die at any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.learning import model as models
from silotune.components.learning.checkpoint import Checkpoint
from silotune.components.learning.local_term import AppliedTerm, LocalTerm
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import Stretch, Trained, train
from silotune.components.terms.training import Training

LORA = {"r": 2, "alpha": 4.0, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
TERMS = Training(precision="float32", steps=6, batch_size=3, learning_rate=1e-2, weight_decay=0.1)


def offsets(base: Path, size: float = 0.1) -> dict[str, np.ndarray]:
    state = models.initial_state(base, {"method": "lora", "dtype": "float32", "lora": LORA}, 0)
    rng = np.random.default_rng(3)
    return {name: (size * rng.standard_normal(a.shape)).astype(np.float32) for name, a in state.items()}


def test_it_is_the_gradient_of_what_the_papers_add_to_the_loss() -> None:
    """∇ [L(θ) + ⟨o, θ⟩ + μ/2 ‖θ - θ₀‖²], by torch's own differentiation."""
    import torch

    torch.manual_seed(1)
    theta = torch.nn.Parameter(torch.randn(4, 3))
    start, offset, mu = theta.detach().clone(), torch.randn(4, 3), 0.3
    applied = AppliedTerm(LocalTerm(mu, {"w": offset.numpy(), "of another round": offset.numpy()}, observe=True), {"w": theta})
    raw = torch.zeros(4, 3)
    for _ in range(3):
        with torch.no_grad():
            theta += torch.randn(4, 3)
        loss = (theta**4).sum()
        (wanted,) = torch.autograd.grad((theta**4).sum() + (offset * theta).sum() + mu / 2 * ((theta - start) ** 2).sum(), theta)
        theta.grad = None
        loss.backward()
        raw += theta.grad / 3
        applied.add()
        torch.testing.assert_close(theta.grad, wanted)
    np.testing.assert_allclose(applied.mean(3)["w"], raw.numpy(), rtol=1e-5)


def test_without_a_term_nothing_is_kept() -> None:
    import torch

    theta = torch.nn.Parameter(torch.ones(2))
    applied = AppliedTerm(LocalTerm(), {"w": theta})
    theta.grad = torch.full((2,), 5.0)
    applied.add()
    assert theta.grad.tolist() == [5.0, 5.0]
    assert applied.mean(1) == {} == applied.seen


def test_its_digest_is_of_all_that_changes_a_training() -> None:
    x, y = np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)
    terms = [
        LocalTerm(), LocalTerm(mu=0.1), LocalTerm(observe=True), LocalTerm(offset={"a": x}), LocalTerm(offset={"b": x}),
        LocalTerm(offset={"a": y}), LocalTerm(offset={"a": x.reshape(4)}), LocalTerm(offset={"a": x, "b": x}),
    ]  # fmt: skip
    assert len({term.digest for term in terms}) == len(terms)
    assert LocalTerm(offset={"a": x, "b": y}).digest == LocalTerm(offset={"b": y, "a": x}).digest


def start(base: Path, shard: Shard, place: Path, term: LocalTerm, every: int, stop: int = 99) -> tuple[dict[str, bytes], Trained]:
    import torch

    model = models.load_trainable(base, {"method": "lora", "dtype": "float32", "lora": LORA}, 0)
    torch.manual_seed(5)
    trained = train(
        model, shard, Stretch(("fed", 17, "north"), 4), TERMS, 1e-2, 64, 2, checkpoint=Checkpoint(place, "round 1", every),
        stop=lambda steps, _: steps == stop, local_term=term,
    )  # fmt: skip
    return {n: a.tobytes() for n, a in models.trainable_state(model).items()}, trained


@pytest.mark.parametrize("stop", [1, 4])
def test_a_training_that_is_taken_up_again_ends_in_the_same_sums(tiny_llama: Path, some_shard: Shard, tmp_path: Path, stop: int) -> None:
    term = LocalTerm(mu=0.2, offset=offsets(tiny_llama), observe=True)
    weights, whole = start(tiny_llama, some_shard, tmp_path / "one", term, 0)
    assert start(tiny_llama, some_shard, tmp_path / "two", term, 3, stop)[1].steps == stop
    again, resumed = start(tiny_llama, some_shard, tmp_path / "two", term, 3)
    assert again == weights
    assert {n: a.tobytes() for n, a in resumed.gradient.items()} == {n: a.tobytes() for n, a in whole.gradient.items()}
    assert whole.gradient.keys() == weights.keys()
    assert min(np.abs(a).max() for n, a in whole.gradient.items() if "lora_B" in n) > 0


def test_a_checkpoint_of_another_term_is_left_alone(tiny_llama: Path, some_shard: Shard, tmp_path: Path) -> None:
    place = tmp_path / "one"
    start(tiny_llama, some_shard, place, LocalTerm(offset=offsets(tiny_llama), observe=True), 3, 3)
    other = LocalTerm(offset=offsets(tiny_llama, 0.2), observe=True)
    found: Any = start(tiny_llama, some_shard, place, other, 3)[0]
    assert found == start(tiny_llama, some_shard, tmp_path / "two", other, 0)[0]
