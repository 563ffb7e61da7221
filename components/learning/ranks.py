"""Ranks: the processes that train one model together, as each of them sees the others.

Every rank holds the whole model, takes its share of each step's rows, adds up the gradients with the others, and then takes the same
optimiser step as they do on the same numbers. So the state of all ranks is the same bytes, which `agree` checks; one that differs is an error.

Sums are torch.distributed's all-reduce (NCCL between GPUs, Gloo between CPUs): the gradients of all trainable parameters in float32, end to
end in the order of the parameters, in buckets of at most `BUCKET` values; losses and counts in float64. All ranks get the same bytes, and the
same bytes again when repeated with as many ranks; another number of ranks adds in another order, and differs by rounding.

What this does not do: nothing is sharded, so every GPU must hold the model, its gradients and the optimiser's state; and nothing is sent while
the backward pass still runs. That costs little with LoRA, whose gradients are a few megabytes. Training all weights of a large model on
several nodes would want both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from silotune.components.errors import SilotuneError
from silotune.components.process.ending import NO_MEMORY_TEXT

BUCKET = 1 << 26  # float32 values: 256 MiB
PATIENCE = timedelta(minutes=30)  # in one exchange, for the slowest rank
LEAVING = timedelta(seconds=30)  # for all ranks to have what they need of each other


class RankLost(SilotuneError):
    """Another process of the training has ended; what it said, or how it ended, is the cause."""

    REASON = "another process was lost"

    def __init__(self) -> None:
        super().__init__("another process of this training ended or cannot be reached; see the log of each node", self.REASON)


class RanksDiffer(SilotuneError):
    """The ranks hold different weights: adding up their gradients would mean nothing."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"the processes of this training hold different weights {where}; "
            "give all nodes the same image, base model and kind of GPU, and run again",
            "processes diverged",
        )


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together. With ``size`` 1 nothing is exchanged and nothing computed."""

    rank: int = 0
    size: int = 1
    device: Any = None  # where tensors must lie to be exchanged
    store: Any = None  # torch.distributed.Store

    def sum_gradients(self, parameters: Sequence[Any], loss: float) -> float:
        """Replace each gradient by its sum over the ranks, and return that of the losses.

        A rank without rows has no gradients and takes part all the same; where no rank has one, as for a parameter that the loss does not
        depend on, there is none afterwards either.
        """
        if self.size == 1:
            return loss
        import torch

        total, *known = self.sums([loss, *(float(p.grad is not None) for p in parameters)])
        bucket: list[Any] = []
        filled = 0
        for parameter in (p for p, count in zip(parameters, known, strict=True) if count):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and filled + parameter.numel() > BUCKET:
                self._sum_bucket(bucket)
                bucket, filled = [], 0
            bucket.append(parameter)
            filled += parameter.numel()
        if bucket:
            self._sum_bucket(bucket)
        return total

    def _sum_bucket(self, parameters: Sequence[Any]) -> None:
        import torch
        import torch.distributed as dist

        flat = torch.cat([p.grad.detach().reshape(-1).float() for p in parameters]).to(self.device)
        with _exchanging():
            dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter.grad))

    def sum_tensors(self, tensors: Sequence[Any]) -> None:
        """Replace each float64 tensor by its sum over the ranks."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            total = tensor.to(self.device)
            with _exchanging():
                dist.all_reduce(total)
            tensor.copy_(total)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over the ranks of each value, in float64."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _exchanging():
            dist.all_reduce(found)
        return [float(x) for x in found.tolist()]

    def decided(self, value: bool) -> bool:
        """What rank 0 says, so that all do the same."""
        return bool(self.sums([float(value and self.rank == 0)])[0]) if self.size > 1 else value

    def agree(self, named: Mapping[str, Any], where: str) -> None:
        """Check that all ranks hold the same bytes. Raises RanksDiffer."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        digest = hashlib.sha256()
        for name, tensor in named.items():
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(self.device)
        least, most = mine.clone(), mine.clone()
        with _exchanging():
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
        if not bool((least == most).all()):
            raise RanksDiffer(where)

    def copied(self, found: tuple[dict[str, Any], dict[str, Any]] | None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What rank 0 has, on all ranks.

        Args:
            found: of rank 0: (what JSON can hold, tensors by name), or None; the others' is not looked at.
        """
        if self.size == 1:
            return found
        import torch

        said = b""
        if self.rank == 0 and found is not None:
            about, tensors = found
            said = json.dumps([about, {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in tensors.items()}]).encode()
        length = int(self.sums([float(len(said))])[0])
        if not length:
            return None
        text = torch.frombuffer(bytearray(said), dtype=torch.uint8).clone() if said else torch.zeros(length, dtype=torch.uint8)
        about, shapes = json.loads(bytes(self._from_first(text).tolist()))
        copies = {}
        for name, (dtype, shape) in shapes.items():
            tensor = found[1][name] if self.rank == 0 and found else torch.empty(shape, dtype=getattr(torch, dtype))
            copies[name] = self._from_first(tensor)
        return about, copies

    def _from_first(self, tensor: Any) -> Any:
        """Rank 0's bytes of a tensor, on the CPU."""
        import torch
        import torch.distributed as dist

        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).to(self.device)
        with _exchanging():
            dist.broadcast(data, 0)
        return data.to("cpu").view(tensor.dtype).reshape(tensor.shape)

    def leave(self) -> None:
        """Wait until no rank needs anything of this one any more. All have their result by then: trouble here is none."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):
                if self.store.add("left", 1) == self.size:
                    self.store.set("all left", "1")
                self.store.wait(["all left"], LEAVING)


ALONE = Ranks()


def backend() -> str:
    """``nccl`` where torch can use a GPU, else ``gloo``."""
    import torch

    return "nccl" if torch.cuda.is_available() else "gloo"


@contextlib.contextmanager
def joined(rank: int, size: int, host: str, port: int) -> Iterator[Ranks]:
    """In each of ``size`` processes that see one GPU each, or none: their exchange, through the TCPStore at ``host:port``.

    Raises:
        RankLost: they do not all come.
    """
    import torch
    import torch.distributed as dist

    kind = backend()
    device = torch.device("cuda", 0) if kind == "nccl" else torch.device("cpu")
    with _exchanging():
        store = dist.PrefixStore("ranks", dist.TCPStore(host, port, None, False, PATIENCE, wait_for_workers=False))
        dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size, device, store)
    finally:
        if dist.is_initialized() and kind == "gloo":  # NCCL's would wait for a rank that has ended; the process ends just after
            dist.destroy_process_group()


@contextlib.contextmanager
def _exchanging() -> Iterator[None]:
    """torch says with a RuntimeError that a rank has gone; one about memory is this rank's own trouble."""
    try:
        yield
    except RuntimeError as error:
        if NO_MEMORY_TEXT.search(str(error)):
            raise
        raise RankLost from error
