"""Separation: whether a model keeps apart the examples that lie side by side in a packed row.

Attention does, by the row's mask. Layers that carry a state along the row, or convolve over it, see no mask: of such a base (LFM2, Jamba,
RecurrentGemma, Falcon-H1, Qwen3-Next) an example's loss depends on the one before it. Then a packed batch has not the loss of an unpacked one, and in
private training one unit would be in the clipped gradient of another. So each model is asked before anything is packed for it, by the derivative of
the second example's logits by the first one's embeddings, which must be zero to the last bit: what is masked has a weight of exactly zero.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from silotune.components.learning.batches import collate
from silotune.components.learning.tokens import Counts, Shard

FIRST, SECOND = 5, 7  # tokens of the two examples
_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def keeps_apart(model: Any) -> bool:
    """Whether rows may hold several examples. Asked of a model once; it is left as it was, and no random number is drawn."""
    if (found := _known.get(model)) is None:
        _known[model] = found = _asked(model)
    return found


def _asked(model: Any) -> bool:
    import torch

    embedding = model.get_input_embeddings()
    device, training, kept = next(model.parameters()).device, model.training, []

    def keep(module: Any, given: Any, out: Any) -> Any:
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    handle = embedding.register_forward_hook(keep)
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            batch = collate(_two(embedding.weight.shape[0]), [[0, 1]], 0).to(device)
            out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
            if not kept:
                return False  # it takes its embeddings from elsewhere, and cannot be asked
            (slope,) = torch.autograd.grad(out.logits[0, FIRST:].float().square().sum(), kept[-1:])
    finally:
        handle.remove()
        model.train(training)
    return bool((slope[0, :FIRST] == 0).all() and (slope[0, FIRST:] != 0).any())


def _two(vocabulary: int) -> Shard:
    """Two examples of made-up tokens."""
    count = FIRST + SECOND
    tokens = (np.arange(1, count + 1) * 7 % vocabulary).astype(np.int32)
    return Shard(
        tokens=tokens, targets=np.ones(count, np.uint8), offsets=np.array([0, FIRST, count]), units=np.arange(2, dtype=np.int32), digest="two",
        counts=Counts(2, count, count, 2, 0, 0),
    )  # fmt: skip
