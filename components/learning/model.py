"""The model: a base from a local folder, made trainable by LoRA (through peft) or as a whole.

What travels between silos is the *trainable state*: a flat dict of float32 tensors. Names are those of peft's own adapter files, or of the
model's parameters, so that a global model is a loadable adapter and needs no translation.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.components.errors import FederationError

if TYPE_CHECKING:
    import numpy as np
    import torch

_kept: ContextVar[dict[str, Any] | None] = ContextVar("kept", default=None)

Schema = dict[str, list[int]]  # tensor name -> shape; every trainable tensor is float32


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a base folder. Raises FederationError where there is none, or it cannot tell where its tokens stand in the text."""
    from transformers import AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FederationError(f"model.base {str(folder)!r}: holds no tokenizer; save the base's tokenizer into the folder") from None
    if not tokenizer.is_fast:
        raise FederationError(
            f"model.base {str(folder)!r}: its tokenizer has no fast version (tokenizer.json), which silotune needs; convert it"
        )
    if tokenizer.eos_token_id is None:
        raise FederationError(
            f"model.base {str(folder)!r}: its tokenizer names no end-of-text token; set eos_token in tokenizer_config.json"
        )
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows; never attended to and never a target, so any valid one will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def load_base(folder: Path, dtype: str) -> Any:
    """The causal language model of a folder, from safetensors only.

    Raises:
        FederationError: no such model, weights not in safetensors or not all there, or an architecture that needs code from the folder.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _quiet()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused just below, by name
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FederationError(
            f"model.base {str(folder)!r}: not a causal language model in safetensors that transformers can load: {reason}"
        ) from None
    model, loaded = found
    # transformers would fill these with random numbers, other ones in every silo.
    absent = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    if absent:
        raise FederationError(
            f"model.base {str(folder)!r}: its weights lack {len(absent)} tensors that config.json asks for, or have other shapes, "
            f"such as {absent[0]!r}; save the whole model with save_pretrained"
        )
    return model


def load_trainable(folder: Path, model_terms: dict[str, Any], seed: int) -> Any:
    """`load_base` and `make_trainable` by an agreement's terms; what is trained is held in float32."""
    dtype = "float32" if model_terms["method"] == "full" else model_terms["dtype"]
    return make_trainable(load_base(folder, dtype), model_terms, seed)


def load_with_state(folder: Path, model_terms: dict[str, Any], state: dict[str, np.ndarray], trained: Collection[str] | None = None) -> Any:
    """The model that a global stands for; within `kept`, the one of the last call with new tensors put in, where that can be.

    Args:
        state: the global's tensors, or what of them a silo's rank can hold; the rank follows from it, the scaling alpha / r from the terms.
        trained: names of the tensors to train, the others are frozen; default: all.
    """
    from silotune.components.learning import adapters

    cores = any(name.endswith(adapters.CORE) for name in state)
    if cores and trained is None:
        state, cores = adapters.without_cores(state), False
    deltas = any(name.endswith(adapters.DELTA) for name in state)
    cache = None if cores or deltas else _kept.get()  # these change the model itself
    key = f"{folder}|{model_terms}|{adapters.rank_of(state)}"
    model = cache.get(key) if cache is not None else None
    if model is None:
        model = load_trainable(folder, _of_rank(model_terms, adapters.rank_of(state)), seed=0)  # new weights are overwritten just below
        if cores:
            adapters.insert_cores(model)
        adapters.add_deltas(model, state)
    if cache is not None:
        cache.clear()
        cache[key] = model
    load_state(model, {name: array for name, array in state.items() if not name.endswith(adapters.DELTA)})
    for name, tensor in _parameters(model).items():
        tensor.requires_grad_(trained is None or name in trained)
        tensor.grad = None  # a training that failed on the way may have left one
    return model


def _of_rank(model_terms: dict[str, Any], rank: int) -> dict[str, Any]:
    """The terms of a silo of that rank: alpha follows, so that alpha / r stays what it is."""
    if model_terms["method"] == "full":
        return model_terms
    lora = model_terms["lora"]
    return model_terms | {"lora": lora | {"r": rank, "alpha": lora["alpha"] * rank / lora["r"]}}


def initial_state(folder: Path, model_terms: dict[str, Any], seed: int, *, cores: bool = False) -> dict[str, np.ndarray]:
    """The first global: LoRA's factors by seed, as peft begins them, or the weights of the base as they are.

    Args:
        cores: with a core in every adapter (see `aggregation.core`).
    """
    from silotune.components.learning import adapters

    model = load_trainable(folder, model_terms, seed)
    return adapters.with_cores(model) if cores else trainable_state(model)


@contextmanager
def kept() -> Iterator[None]:
    """Keep the model that `load_with_state` returns for its next call, where one process does the work of many silos."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def make_trainable(base: Any, model_terms: dict[str, Any], seed: int) -> Any:
    """Freeze a base and add adapters, or leave every weight trainable. New weights depend on ``seed`` only.

    Raises:
        FederationError: target modules that match nothing, with the names that exist.
    """
    import torch

    torch.manual_seed(seed)
    if model_terms["method"] == "full":
        base.requires_grad_(True)
        return base
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
        return get_peft_model(base, lora_config(base, model_terms["lora"]))


def lora_config(base: Any, lora: dict[str, Any]) -> Any:
    """peft's configuration of the adapters, with target modules checked and spelled out."""
    import torch
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    output = base.get_output_embeddings()
    layers = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not output}
    names = sorted({n.rsplit(".", 1)[-1] for n in layers})
    targets = names if lora["target_modules"] == "all-linear" else lora["target_modules"]
    if unknown := [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in layers)]:
        raise FederationError(f"model.lora.target_modules: no layer is named {', '.join(unknown)}; this base has {', '.join(names)}")
    convolved = [isinstance(m, Conv1D) for n, m in layers.items() if any(n == t or n.endswith(f".{t}") for t in targets)]
    if any(convolved) and not all(convolved):
        raise FederationError(
            "model.lora.target_modules: may not mix Conv1D and Linear layers, whose weights lie the other way round; choose one kind"
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=sorted(targets),
        fan_in_fan_out=any(convolved),  # GPT-2's Conv1D keeps its weight as (in, out)
    )


def trainable_state(model: Any) -> dict[str, np.ndarray]:
    """Copies of the trainable tensors as float32 arrays on the CPU, by name in sorted order."""
    import torch

    return {name: tensor.detach().to("cpu", torch.float32).numpy().copy() for name, tensor in sorted(trainable(model).items())}


def load_state(model: Any, state: dict[str, np.ndarray]) -> None:
    """Put a trainable state into a model. Raises ValueError where names or shapes differ."""
    import torch

    own = _parameters(model)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ValueError(f"the state and the model differ in {len(odd)} tensor names, such as {odd[0]!r}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"tensor {name!r}: the model's shape is {tuple(tensor.shape)}, the state's {state[name].shape}")
            tensor.copy_(torch.tensor(state[name]))


def schema_of(state: dict[str, np.ndarray]) -> Schema:
    return {name: list(array.shape) for name, array in sorted(state.items())}


def _quiet() -> None:
    """No progress bars and no advice in the logs of a batch job: whatever matters is checked here and raised."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """The trainable parameters themselves (not copies), under the names they travel by."""
    return {name: tensor for name, tensor in _parameters(model).items() if tensor.requires_grad}


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that a global sets, under the names they travel by: the adapters', else all."""
    from silotune.components.learning import adapters

    return adapters.named_tensors(model) or dict(model.named_parameters())
