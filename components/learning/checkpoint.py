"""Checkpoint: what a local training needs to go on after its process has died, in one file in the silo's own storage.

A training that is killed at any moment and started again takes up its last checkpoint and ends in the same bytes as one that nobody
disturbed. So the file holds all that the next step depends on: the trainable weights, the optimiser's state, the random numbers' state
(dropout draws from it), and what has been seen so far. It is a safetensors file, never a pickle:

    weight/<parameter>            trainable weights, in their own type
    optimizer/<key>/<parameter>   of AdamW: step, exp_avg, exp_avg_sq
    random/<device>               state of torch's generators: cpu, and that of the device if it is another
    metadata "seen"               JSON: identity of the training, steps, examples, tokens, loss_sum (float.hex), cursor
    metadata "sha256"             of "seen" and of every tensor's name, type, shape and bytes

There is one file per training. Each checkpoint replaces the last by renaming, after all of it is on disk, so that for a moment there must
be room for two; what a killed process leaves half written lies in one folder beside it, which the next load or save removes.

Where several processes train together, rank 0 writes the file, and reads it for all. A training may go on with another number of processes; its
bytes are promised to be the same only for the same number.

A file that is damaged, of another training, or does not fit the model is as good as none: the training starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.components.errors import SilotuneError

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


class NotSaved(SilotuneError):
    """A checkpoint could not be written; the one before it, if any, is untouched."""

    def __init__(self, path: Path, error: Exception) -> None:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        super().__init__(f"checkpoint '{path}': must be writable, got: {said}; free space or allow writing there", "checkpoint not written")


@dataclass(frozen=True)
class Seen:
    """How far a training has come."""

    steps: int
    examples: int
    tokens: int  # target tokens
    loss_sum: float  # nats, over the target tokens
    cursor: int  # where the data stream goes on


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its checkpoint, and how often it writes one."""

    path: Path
    identity: str  # digest of all that the training depends on; a checkpoint of another identity is left alone
    every: int  # steps; 0: never, and none is looked for

    def due(self, steps: int) -> bool:
        """Whether one is to be written after so many steps."""
        return self.every > 0 and steps % self.every == 0


def save(checkpoint: Checkpoint, seen: Seen, tensors: Tensors) -> None:
    """Replace the checkpoint, atomically and durably; only its owner may read it (0600).

    Raises:
        NotSaved: it could not be written. Nothing half written stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path, scratch = checkpoint.path, _scratch(checkpoint.path)
    about = json.dumps({"identity": checkpoint.identity, **asdict(seen), "loss_sum": seen.loss_sum.hex()})
    part = scratch / "part"  # in a folder of its own, because safetensors itself writes under a random name first
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        save_file(tensors, part, {"seen": about, "sha256": _digest(about, tensors)})
        part.chmod(0o600)
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise NotSaved(path, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(checkpoint: Checkpoint) -> tuple[Seen, Tensors] | None:
    """What the last `save` of the same identity wrote, to be copied before use; None if there is none. A damaged file is removed."""
    from safetensors import SafetensorError, safe_open

    path = checkpoint.path
    shutil.rmtree(_scratch(path), ignore_errors=True)
    try:
        with safe_open(path, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            about = json.loads(metadata["seen"])
            if about.pop("identity") != checkpoint.identity:
                return None
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata["sha256"] == _digest(metadata["seen"], tensors):
            return Seen(**{**about, "loss_sum": float.fromhex(about["loss_sum"])}), tensors
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(
            f"checkpoint '{path}': cannot be read ({error.strerror or error}); training starts over", RuntimeWarning, stacklevel=2
        )
        return None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        pass  # what damage can make of a header
    warnings.warn(f"checkpoint '{path}': is damaged and was removed; training starts over", RuntimeWarning, stacklevel=2)
    with suppress(OSError):
        path.unlink()
    return None


def capture(named: Mapping[str, Any], optimizer: Any, device: Any, sums: Mapping[str, Any]) -> Tensors:
    """All tensors that the next step, or the end, depends on.

    Args:
        named: trainable parameters by name.
        device: where the model lies; its random numbers are kept besides the CPU's.
        sums: what is added up over the steps, by parameter's name.
    """
    import torch

    found = {f"weight/{name}": parameter for name, parameter in named.items()}
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})  # empty for a parameter that the loss does not depend on
        found |= {f"optimizer/{key}/{name}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    found |= {f"sum/{name}": total for name, total in sums.items()}
    found |= {f"random/{kind}": source.get_rng_state() for kind, source in _generators(device).items()}
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in found.items()}


def restore(tensors: Tensors, named: Mapping[str, Any], optimizer: Any, device: Any, sums: Mapping[str, Any]) -> bool:
    """Put captured tensors back. False, and nothing is changed, where they do not fit the model or this machine's random numbers."""
    import torch

    generators = _generators(device)
    wanted = {f"weight/{name}": parameter for name, parameter in named.items()}
    wanted |= {f"sum/{name}": total for name, total in sums.items()}
    wanted |= {f"random/{kind}": source.get_rng_state() for kind, source in generators.items()}
    states: dict[str, Tensors] = {}
    for name in tensors.keys() - wanted.keys():
        kind, _, rest = name.partition("/")
        key, _, owner = rest.partition("/")
        if kind != "optimizer" or owner not in named or (key != "step" and tensors[name].shape != named[owner].shape):
            return False
        states.setdefault(owner, {})[key] = tensors[name].clone()  # a tensor that was read may be a view of the file
    if not all(n in tensors and (tensors[n].shape, tensors[n].dtype) == (t.shape, t.dtype) for n, t in wanted.items()):
        return False
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weight/{name}"])
        for name, total in sums.items():
            total.copy_(tensors[f"sum/{name}"])
    numbered = {i: states[name] for i, name in enumerate(named) if name in states}
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
    for kind, source in generators.items():
        source.set_rng_state(tensors[f"random/{kind}"].clone())
    return True


def _generators(device: Any) -> dict[str, Any]:
    """The torch modules that keep the random numbers of the CPU, and of the current device of the model's kind."""
    import torch

    return {"cpu": torch} | ({} if device.type == "cpu" else {device.type: torch.get_device_module(device)})


def _digest(about: str, tensors: Tensors) -> str:
    import torch

    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
