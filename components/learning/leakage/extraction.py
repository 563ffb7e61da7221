"""Extraction: does a model, given the beginning of a record, go on with the rest of it (Carlini et al. 2020, arXiv:2012.07805; in the form of
Carlini et al. 2022, arXiv:2202.07646: the true beginning, greedy decoding, and verbatim agreement)?

What it says of records that were never trained on is the yardstick: what is common can be guessed, and gives nobody away.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from silotune.components.learning.tokens import Shard
from silotune.components.terms.section import Section

TOKENS = 16  # that must agree


class Extraction(Section):
    """Of some records, and of others."""

    members: float  # share whose continuation came out verbatim
    others: float
    tokens: int  # that were asked for at most
    asked: tuple[int, int]

    @property
    def surprising(self) -> bool:
        """Whether so many more members come out that chance does not explain it, by three standard errors."""
        (n, m), pooled = self.asked, 0.0
        pooled = (self.members * n + self.others * m) / (n + m)
        return self.members - self.others > 3 * (pooled * (1 - pooled) * (1 / n + 1 / m)) ** 0.5 and self.members > self.others


def comes_out(model: Any, shard: Shard, indices: np.ndarray, tokens: int = TOKENS) -> np.ndarray:
    """Whether the model goes on verbatim from where each example's targets begin; of `text`, from its middle. (len(indices),) bool."""
    import torch
    from accelerate import PartialState

    device = PartialState().device
    model.to(device).eval()
    found = np.zeros(len(indices), bool)
    with torch.inference_mode():
        for place, index in enumerate(indices):
            ids, targets = shard.example(int(index))
            first = int(np.argmax(targets)) if targets.any() else len(ids)
            begin = first if first > 1 else len(ids) // 2
            wanted = torch.from_numpy(np.asarray(ids[begin : begin + tokens], np.int64)).to(device)
            rows = torch.from_numpy(np.asarray(ids, np.int64))[None].to(device)
            # Greedy decoding agrees with the rest if, and only if, each of its tokens is the most likely one after all before it.
            if begin and len(wanted):
                logits = model(input_ids=rows[:, : begin + len(wanted)], use_cache=False).logits[0]
                found[place] = bool((logits[begin - 1 : begin - 1 + len(wanted)].argmax(-1) == wanted).all())
    return found


def extraction(members: np.ndarray, others: np.ndarray, tokens: int = TOKENS) -> Extraction:
    """Raises ValueError where there is nobody to ask."""
    if not len(members) or not len(others):
        raise ValueError("extraction: needs one member and one other at least")
    return Extraction(members=float(members.mean()), others=float(others.mean()), tokens=tokens, asked=(len(members), len(others)))
