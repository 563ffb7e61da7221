"""The model: what is trained, under which names, and that a wrong base is refused rather than filled up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.components.errors import FederationError
from silotune.components.learning import model as models

IDS = [[0, 40, 77, 290, 15, 101, 60, 1]]


def terms(method: str = "lora", dtype: str = "float32", **lora: Any) -> dict[str, Any]:
    return {"method": method, "dtype": dtype, "lora": {"r": 4, "alpha": 12.0, "dropout": 0.0, "target_modules": "all-linear", **lora}}


def logits_of(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor(IDS)).logits


def moved(state: dict[str, np.ndarray], scale: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: (array + scale * rng.standard_normal(array.shape)).astype(np.float32) for name, array in state.items()}


@pytest.fixture
def copy_of(tmp_path: Path, tiny_llama: Path) -> Path:
    """A base folder to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


# Bases


def test_tokenizer_is_loaded_and_pads(tiny_base: Path) -> None:
    tokenizer = models.load_tokenizer(tiny_base)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, models.pad_id(tokenizer)) == (0, 1, 2)
    tokenizer.pad_token = None
    assert models.pad_id(tokenizer) == 1


def test_base_without_tokenizer(copy_of: Path) -> None:
    for file in copy_of.glob("*token*"):
        file.unlink()
    with pytest.raises(FederationError, match="holds no tokenizer; save the base's tokenizer into the folder"):
        models.load_tokenizer(copy_of)


def test_tokenizer_without_end_token(copy_of: Path) -> None:
    file = copy_of / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("eos_token")
    file.write_text(json.dumps(config))
    with pytest.raises(FederationError, match="names no end-of-text token"):
        models.load_tokenizer(copy_of)


def test_weights_that_would_have_to_be_unpickled_are_refused(copy_of: Path) -> None:
    import torch

    torch.save(models.load_base(copy_of, "float32").state_dict(), copy_of / "pytorch_model.bin")
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(FederationError, match="not a causal language model in safetensors"):
        models.load_base(copy_of, "float32")


def test_truncated_weights(copy_of: Path) -> None:
    file = copy_of / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FederationError, match="not a causal language model in safetensors"):
        models.load_base(copy_of, "float32")


def test_weights_that_are_not_all_there_are_not_made_up(copy_of: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(copy_of / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy_of / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FederationError, match=r"weights lack 1 tensors .*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        models.load_base(copy_of, "float32")


def test_weights_of_another_shape_are_not_made_up(copy_of: Path) -> None:
    config = json.loads((copy_of / "config.json").read_text())
    (copy_of / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(FederationError, match=r"or have other shapes, such as 'model\.layers\.0\.mlp\.down_proj\.weight'"):
        models.load_base(copy_of, "float32")


@pytest.mark.parametrize("config", ["{}", "{", '{"model_type": "no-such-architecture"}', '{"model_type": "t5"}'])
def test_folder_of_no_causal_language_model(copy_of: Path, config: str) -> None:
    (copy_of / "config.json").write_text(config)
    with pytest.raises(FederationError, match="not a causal language model"):
        models.load_base(copy_of, "float32")


# LoRA


def lora_layers(model: Any) -> set[str]:
    return {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n in models.trainable_state(model) if ".lora_A" in n}


def test_all_linear_is_every_layer_but_the_output(tiny_llama: Path, tiny_gpt2: Path) -> None:
    llama = models.load_trainable(tiny_llama, terms(), 0)
    assert lora_layers(llama) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(models.trainable_state(llama)) == 2 * 2 * 7
    gpt2 = models.load_trainable(tiny_gpt2, terms(), 0)
    assert lora_layers(gpt2) == {"c_attn", "c_proj", "c_fc"}
    assert len(models.trainable_state(gpt2)) == 2 * 2 * 4


def test_only_the_adapters_of_the_targets_train(tiny_llama: Path) -> None:
    state = models.trainable_state(models.load_trainable(tiny_llama, terms(target_modules=["q_proj", "self_attn.v_proj"]), 0))
    layers = [f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"]
    assert list(state) == sorted(layers)
    shapes = {(n.split(".")[-3], n.split(".")[-2]): s for n, s in models.schema_of(state).items()}
    assert shapes == {
        ("q_proj", "lora_A"): [4, 32],
        ("q_proj", "lora_B"): [32, 4],
        ("v_proj", "lora_A"): [4, 32],
        ("v_proj", "lora_B"): [16, 4],
    }


def test_unknown_targets_name_those_that_exist(tiny_base: Path) -> None:
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" if "llama" in tiny_base.name else "c_attn, c_fc, c_proj"
    with pytest.raises(FederationError, match=f"no layer is named query, lm_head; this base has {known}"):
        models.load_trainable(tiny_base, terms(target_modules=["query", "lm_head"]), 0)


def test_layers_of_two_orientations_are_not_mixed(tiny_gpt2: Path) -> None:
    import torch

    base = models.load_base(tiny_gpt2, "float32")
    base.transformer.h[0].extra = torch.nn.Linear(32, 32)
    with pytest.raises(FederationError, match="may not mix Conv1D and Linear"):
        models.make_trainable(base, terms(), 0)
    assert models.lora_config(base, terms(target_modules=["extra"])["lora"]).fan_in_fan_out is False
    assert models.lora_config(base, terms(target_modules=["c_attn"])["lora"]).fan_in_fan_out is True


def test_adapters_do_what_the_paper_says(tiny_base: Path) -> None:
    """h = W x + (alpha / r) B A x: the same as adding (alpha / r) B A to W by hand, whichever way W lies."""
    import torch

    model = models.load_trainable(tiny_base, terms(), 0)
    untouched = logits_of(models.load_base(tiny_base, "float32"))
    torch.testing.assert_close(logits_of(model), untouched, atol=1e-6, rtol=0)  # B starts at zero
    state = moved(models.trainable_state(model))
    models.load_state(model, state)
    base = models.load_base(tiny_base, "float32")
    with torch.no_grad():
        for name, a in state.items():
            if ".lora_A." in name:
                layer = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                product = torch.from_numpy(state[name.replace("lora_A", "lora_B")] @ a) * 12.0 / 4
                layer.weight += product if isinstance(layer, torch.nn.Linear) else product.T
    by_hand = logits_of(base)
    assert (by_hand - untouched).abs().max() > 0.1
    torch.testing.assert_close(logits_of(model), by_hand, atol=1e-4, rtol=0)


def test_initial_weights_depend_on_the_seed_alone(tiny_llama: Path) -> None:
    import torch

    torch.manual_seed(1)
    first = models.trainable_state(models.load_trainable(tiny_llama, terms(), 7))
    torch.manual_seed(2)
    again = models.trainable_state(models.load_trainable(tiny_llama, terms(), 7))
    other = models.trainable_state(models.load_trainable(tiny_llama, terms(), 8))
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in again.items()}
    assert any((first[n] != other[n]).any() for n in first)


def test_state_loads_as_an_ordinary_adapter(tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.numpy import save_file

    model = models.load_trainable(tiny_base, terms(), 0)
    state = moved(models.trainable_state(model))
    models.load_state(model, state)
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.load_base(tiny_base, "float32"), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not torch.equal(logits_of(loaded), logits_of(models.load_base(tiny_base, "float32")))


# Full, states and number formats


def test_full_method_trains_every_weight_once(tiny_base: Path) -> None:
    import torch

    model = models.load_trainable(tiny_base, terms("full"), 0)
    state = models.trainable_state(model)
    assert sum(a.size for a in state.values()) == sum(p.numel() for p in model.parameters())
    assert ("lm_head.weight" in state) == ("llama" in tiny_base.name)  # GPT-2's is the embedding itself
    other = models.load_trainable(tiny_base, terms("full"), 0)
    models.load_state(other, moved(state, 0.01))
    assert not torch.equal(logits_of(other), logits_of(model))
    models.load_state(other, state)
    assert torch.equal(logits_of(other), logits_of(model))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_state_round_trip(tiny_llama: Path, method: str) -> None:
    model = models.load_trainable(tiny_llama, terms(method), 0)
    state = moved(models.trainable_state(model))
    models.load_state(model, state)
    again = models.trainable_state(model)
    assert list(again) == sorted(state)
    assert all(again[n].dtype == np.float32 and again[n].tobytes() == state[n].tobytes() for n in state)
    kept = {n: a.copy() for n, a in again.items()}
    models.load_state(model, moved(state))
    assert all((again[n] == kept[n]).all() for n in kept)  # copies, not views


def test_state_of_another_model_is_refused(tiny_llama: Path) -> None:
    model = models.load_trainable(tiny_llama, terms(target_modules=["q_proj"]), 0)
    state = models.trainable_state(model)
    name = next(iter(state))
    with pytest.raises(ValueError, match="differ in 1 tensor names, such as"):
        models.load_state(model, {n: a for n, a in state.items() if n != name})
    with pytest.raises(ValueError, match="differ in 1 tensor names, such as 'extra'"):
        models.load_state(model, {**state, "extra": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="the model's shape is"):
        models.load_state(model, {**state, name: state[name].T.copy()})


def test_what_is_trained_is_float32(tiny_llama: Path) -> None:
    import torch

    lora = models.load_trainable(tiny_llama, terms(dtype="bfloat16"), 0)
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}
    full = models.load_trainable(tiny_llama, terms("full", dtype="bfloat16"), 0)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
