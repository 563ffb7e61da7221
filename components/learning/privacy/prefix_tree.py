"""A binary tree over rounds, for noise on the sums of all rounds so far (Dwork et al. 2010, doi:10.1145/1806689.1806787; Chan et al. 2011,
doi:10.1145/2043621.2043626; as DP-FTRL, Kairouz et al. 2021, arXiv:2103.00039).

Node (level, index) stands for the rounds index·2^level + 1 … (index + 1)·2^level and has noise of its own, which never changes. The sum
of rounds 1 … t is published with the noise of the few nodes that make up 1 … t, one for each 1 in the binary form of t. So its noise grows
with log t and not with t.

What that costs. Of the nodes, only those are ever used that some 1 … t is made of, and t brings exactly one new one: that of its last 2^k
rounds, where 2^k divides t. A party that takes part in *every* round moves it by 2^k clips. So T rounds have the squared sensitivity
Σ_t 4^k(t) = T²·(1 + o(1)) for a T that is a power of 2, not the (log T + 1) of a party that takes part once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """Some consecutive rounds: ``2**level`` of them."""

    level: int
    index: int


def prefix(rounds: int) -> tuple[Node, ...]:
    """The nodes that rounds 1 … ``rounds`` are made of, the longest first."""
    found, start = [], 0
    for level in range(rounds.bit_length() - 1, -1, -1):
        if rounds >> level & 1:
            found.append(Node(level, start >> level))
            start += 1 << level
    return tuple(found)


def step(number: int) -> tuple[tuple[int, Node], ...]:
    """(sign, node) of the noise that sum ``number`` has and the sum before has not, and the other way round."""
    now, before = prefix(number), prefix(number - 1)
    return (*((1, n) for n in now if n not in before), *((-1, n) for n in before if n not in now))


def squared_sensitivity(number: int) -> int:
    """What round ``number`` adds to the tree's, in clips squared, for a party that takes part in every round: 4^k, 2^k the greatest that divides it."""
    return (number & -number) ** 2
