"""What aggregation carries from round to round, in the store: the server's optimiser, LoRA's remainder, running bounds and memories.

A commit names each by the digest of its object. So a round's result follows from the store alone, can be made again, and is left behind with
its global where a rollback leaves that behind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.components import opening
from silotune.components.federation import Agreement
from silotune.components.learning.aggregation.combination import OPTIMIZER, REST, Carried, Combined, Round
from silotune.components.learning.aggregation.factors import A
from silotune.components.learning.aggregation.spectrum import collapsed
from silotune.components.learning.tensor_file import TensorFile, open_tensor_file
from silotune.components.protocol import Commit, Plan, Spectrum
from silotune.components.rounds import Rounds

if TYPE_CHECKING:
    import numpy as np

NUMBERS = "numbers"  # the JSON object among what is carried
VALUES = 64  # singular values that a commit holds at most


def round_of(rounds: Rounds, latest: Commit, plan: Plan, agreement: Agreement, incoming: TensorFile, folder: Path) -> Round:
    """What the round of a plan is made from, besides its updates.

    Raises:
        CorruptObject, ObjectMissing: what is carried cannot be read.
    """
    terms = agreement.aggregation
    known = opening.carried_on(rounds, latest, agreement)
    files = {
        name: open_tensor_file(rounds.fetch_object(known[name], folder / f"{name}-before")) for name in (OPTIMIZER, REST) if name in known
    }
    numbers = rounds.json_object(known[NUMBERS]) if NUMBERS in known else {}
    lora = agreement.model.get("lora")
    return Round(
        terms=terms, incoming=incoming, silos=len(agreement.silos), parts=agreement.parts, training_of=agreement.training_of, scale=lora["alpha"] / lora["r"] if lora else 1.0,
        carried=Carried(files, numbers), initial=_begun_anew(agreement, plan, incoming) if terms.traits.combine == "stack" else {},
        groups=terms.groups(plan.participants),
    )  # fmt: skip


def _begun_anew(agreement: Agreement, plan: Plan, incoming: TensorFile) -> dict[str, np.ndarray]:
    """A of every adapter by seed, other numbers in every round, as peft begins them: uniform in ±1/√in (He et al. 2015 with a = √5)."""
    import numpy as np

    from silotune.components.learning.batches import seed_of

    made = {}
    for name, entry in incoming.entries.items():
        if name.endswith(A):
            draw = np.random.default_rng(seed_of(agreement.federation, agreement.training.seed, plan.round, "flora", name))
            bound = 1 / math.sqrt(entry.shape[1])
            made[name] = draw.uniform(-bound, bound, entry.shape).astype(np.float32)
    return made


def put(rounds: Rounds, made: Combined) -> dict[str, str]:
    """Store what goes to the next round; name -> digest."""
    digests = {name: rounds.put_object(path) for name, path in made.files.items()}
    return digests | ({NUMBERS: rounds.put_json_object(made.numbers)} if made.numbers else {})


def rank_lost(rounds: Rounds, now: Spectrum) -> str | None:
    """What to say where adapters of the global have come to use much less of their rank than they once did; None where they have not."""
    before = max((c.spectrum.least_effective_rank for c in rounds.commits() if c.spectrum), default=0.0)
    if not collapsed(now.least_effective_rank, before):
        return None
    return (
        f"an adapter's effective rank has fallen to {now.least_effective_rank:.2g} from {before:.2g}; look at aggregate/singular_value in MLflow, "
        "and lower the learning rate or the rank"
    )


def spectrum_of(made: Combined) -> Spectrum | None:
    """The modules' spectra as one; None where the strategy makes none."""
    import numpy as np

    found = [s for _, s in sorted(made.spectra.items()) if s.values.any()]
    if not found:
        return None
    most = min(len(s.values) for s in found)
    shapes = np.array([s.values[:most] / math.sqrt(float(np.sum(np.square(s.values)))) for s in found])
    ranks = [s.effective_rank for s in found]
    return Spectrum(
        residual=float(np.mean([s.residual for s in found])), effective_rank=float(np.mean(ranks)), least_effective_rank=min(ranks),
        values=[float(x) for x in shapes.mean(axis=0)[:VALUES]],
    )  # fmt: skip
