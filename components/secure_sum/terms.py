"""What follows from the agreement for a secure sum, alike in silos and coordinator: weights, numbers, thresholds, holders of shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from silotune.components.errors import FederationError
from silotune.components.federation import Agreement
from silotune.components.terms.privacy import SecureAggregation, threshold_of

if TYPE_CHECKING:
    from silotune.components.learning.privacy.fixed_point import FixedPoint

Schema = Mapping[str, Sequence[int]]  # tensor name -> shape
NOISY_BITS = 20
LEAST = 3  # silos in a sum: of two, each can take away its own


def terms_of(agreement: Agreement) -> SecureAggregation:
    """Raises FederationError where updates are not summed securely."""
    if (terms := agreement.privacy.secure_aggregation) is None:
        raise FederationError("privacy.secure_aggregation: is not in the terms of this round; compile the pipeline anew")
    return terms


def threshold(agreement: Agreement) -> int:
    """Silos whose shares open a sum."""
    return threshold_of(terms_of(agreement), len(agreement.silos))


def least(agreement: Agreement) -> int:
    """Silos that a roster, or a sum, must have."""
    return max(threshold(agreement), LEAST)


def places(agreement: Agreement) -> dict[str, int]:
    """At which number each silo holds shares."""
    return {silo: place for place, silo in enumerate(sorted(agreement.silos), 1)}


def examples(agreement: Agreement, silo: str) -> int:
    """What the terms ask a silo to train on in a round; what it has seen of that is its own business."""
    return agreement.examples_of(silo)


def weight(agreement: Agreement, silo: str) -> float:
    """What a silo's update is multiplied by, at most one: known to all beforehand, whatever its records are."""
    if agreement.aggregation.weights == "uniform":
        return 1.0
    return examples(agreement, silo) / max(examples(agreement, other) for other in agreement.silos)


def size_of(schema: Schema) -> int:
    """Numbers in tensors of these shapes."""
    return sum(math.prod(shape) for shape in schema.values())


def fixed_point(agreement: Agreement, schema: Schema) -> FixedPoint:
    """How numbers become whole ones. Raises FederationError where no ring holds the sum, or no noise keeps the promise."""
    from silotune.components.learning.privacy.fixed_point import FixedPoint

    clip = agreement.aggregation.clip
    try:
        noise = _noise(agreement, size_of(schema))
        return FixedPoint((clip and clip.norm) or 0.0, _bits(agreement), len(agreement.silos), noise)
    except ValueError as error:
        raise FederationError(f"privacy.secure_aggregation: {error}") from None


def vector_bytes(agreement: Agreement, schema: Schema) -> int:
    """Of a masked vector of these tensors."""
    return size_of(schema) * fixed_point(agreement, schema).width // 8


def _noise(agreement: Agreement, numbers: int) -> int:
    """Scale of the noise that each silo adds, in quanta; 0 where none is promised. Enough comes of the fewest silos that a sum can have."""
    silo = agreement.privacy.silo
    if silo is None:
        return 0
    from silotune.components.learning.privacy.discrete_gaussian import scale_for

    return scale_for(silo.epsilon, silo.delta, agreement.privacy.rounds or 1, _bits(agreement), numbers, least(agreement))


def _bits(agreement: Agreement) -> int:
    """Under noise, a finer quantum would add nothing but digits of noise."""
    return min(terms_of(agreement).bits, NOISY_BITS) if agreement.privacy.silo else terms_of(agreement).bits


def silo_rho(agreement: Agreement, schema: Schema) -> float:
    """What one sum costs of the promise about silos, in concentrated differential privacy; 0 where none is made."""
    if agreement.privacy.silo is None:
        return 0.0
    from silotune.components.learning.privacy.discrete_gaussian import concentrated_rho

    point = fixed_point(agreement, schema)
    return concentrated_rho(point.bits, size_of(schema), least(agreement), point.noise)
