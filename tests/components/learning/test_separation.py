"""Packed rows are for models that keep examples apart; others get a row for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from silotune.components.learning import model as models
from silotune.components.learning.batches import batches
from silotune.components.learning.evaluation import evaluate
from silotune.components.learning.privacy.accounting import Mechanism
from silotune.components.learning.privacy.private_gradient import Private
from silotune.components.learning.separation import keeps_apart
from silotune.components.learning.tokens import Shard
from silotune.components.learning.training import Stretch, token_losses, train
from silotune.components.terms.training import Training

PAD = 2
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def of_convolutions() -> Any:
    """LFM2: a short convolution, then attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return loud(Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])))


def of_states() -> Any:
    """Jamba: Mamba's layers between attention's."""
    from transformers import JambaConfig, JambaForCausalLM

    return loud(JambaForCausalLM(JambaConfig(**SIZES, num_experts=1, attn_layer_offset=1, attn_layer_period=2, use_mamba_kernels=False)))


def loud(model: Any) -> Any:
    """With weights that let a layer's part be heard."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def with_adapters(model: Any) -> Any:
    lora = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
    return models.make_trainable(model, {"method": "lora", "lora": lora}, 0)


def test_attention_keeps_examples_apart(tiny_base: Path) -> None:
    model = models.load_trainable(tiny_base, {"method": "full", "dtype": "float32"}, 0).train()
    state = torch.get_rng_state()
    assert keeps_apart(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_asked_counts_as_one_that_does_not(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load_trainable(tiny_llama, {"method": "full", "dtype": "float32"}, 0)
    monkeypatch.setattr(model, "get_input_embeddings", lambda: torch.nn.Embedding(300, 32))
    assert not keeps_apart(model)


@pytest.mark.parametrize("made", [of_convolutions, of_states])
def test_what_runs_along_the_row_does_not(made: Callable[[], Any], some_shard: Shard) -> None:
    model = with_adapters(made()).eval()
    assert not keeps_apart(model)
    losses = {}
    with torch.no_grad():
        for packing in (True, False):
            (batch,) = batches(some_shard, np.arange(len(some_shard)), 1, 64, PAD, packing)
            losses[packing] = float(token_losses(model, batch).double().sum())
    assert abs(losses[True] - losses[False]) > 1e-3 * losses[False]  # so that it matters
    score = evaluate(model, some_shard, np.arange(len(some_shard)), 10, 64, PAD)
    assert score.loss_sum == pytest.approx(losses[False], rel=1e-6)


@pytest.mark.parametrize("private", [True, False])
def test_training_gives_each_example_of_such_a_base_its_own_row(private: bool, some_shard: Shard) -> None:
    """Under privacy another unit's tokens would be in a unit's clipped gradient, so that the clip would bound nothing."""
    how = Private(Mechanism(sampling_probability=1.0, noise_multiplier=1e-4, steps=2), 0.4, "flat", bytes(32)) if private else None
    found = []
    for packing in (True, False):
        model = with_adapters(of_convolutions())
        terms = Training(steps=2, batch_size=10, accumulation=1, precision="float32", packing=packing)
        train(model, some_shard, Stretch(("fed", 17, "north"), 0), terms, 1e-2, 64, PAD, private=how)
        found.append(models.trainable_state(model))
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
