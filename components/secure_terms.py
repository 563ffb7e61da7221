"""What follows from the agreement for a secure sum, alike in silos and coordinator: weights, numbers, thresholds, holders of shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from silotune.components.errors import FederationError
from silotune.components.federation import Agreement
from silotune.components.learning.privacy.fixed_point import FixedPoint
from silotune.components.privacy_terms import SecureAggregation, threshold_of

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
    training = agreement.training_of(silo)
    return training.steps * training.batch_size


def weight(agreement: Agreement, silo: str) -> float:
    """What a silo's update is multiplied by, at most one: known to all beforehand, whatever its records are."""
    if agreement.aggregation.weights == "uniform":
        return 1.0
    return examples(agreement, silo) / max(examples(agreement, other) for other in agreement.silos)


def fixed_point(agreement: Agreement) -> FixedPoint:
    """How numbers become whole ones. Raises FederationError where no ring holds the sum."""
    clip = agreement.aggregation.clip
    try:
        return FixedPoint((clip and clip.norm) or 0.0, terms_of(agreement).bits, len(agreement.silos))
    except ValueError as error:
        raise FederationError(f"privacy.secure_aggregation: {error}") from None


def vector_bytes(agreement: Agreement, schema: Mapping[str, Sequence[int]]) -> int:
    """Of a masked vector of these tensors."""
    return sum(math.prod(shape) for shape in schema.values()) * fixed_point(agreement).width // 8
