import math

import pytest

from silotune.components.learning.privacy.prefix_tree import Node, prefix, squared_sensitivity, step


def covered(node):
    return set(range(node.index * 2**node.level + 1, (node.index + 1) * 2**node.level + 1))


@pytest.mark.parametrize("rounds", range(1, 70))
def test_a_prefix_is_made_of_few_nodes_that_do_not_overlap(rounds):
    nodes = prefix(rounds)
    parts = [covered(n) for n in nodes]
    assert set().union(*parts) == set(range(1, rounds + 1))
    assert sum(map(len, parts)) == rounds
    assert len(nodes) == rounds.bit_count()


def test_steps_add_up_to_prefixes():
    held = {}
    for number in range(1, 65):
        for sign, node in step(number):
            held[node] = held.get(node, 0) + sign
        assert {n for n, count in held.items() if count} == set(prefix(number))
        assert set(held.values()) <= {0, 1}


@pytest.mark.parametrize("total", [1, 2, 7, 8, 20, 64])
def test_sensitivity_is_that_of_all_nodes_that_are_ever_used(total):
    """A party that adds a clip to every round moves a node by as many clips as it has rounds."""
    used = {node for number in range(1, total + 1) for node in prefix(number)}
    whole = sum(len(covered(node)) ** 2 for node in used)
    assert whole == sum(squared_sensitivity(number) for number in range(1, total + 1))


def test_noise_of_a_silo_that_is_always_there_is_never_less_than_fresh_noise():
    """Why the docs advise against it: at equal ε, the variance after t rounds is popcount(t)·Σ4^k against t·T."""
    for total in (4, 16, 64, 256):
        whole = sum(squared_sensitivity(number) for number in range(1, total + 1))
        for t in range(1, total + 1):
            assert math.sqrt(t.bit_count() * whole) >= math.sqrt(t * total) * (1 - 1e-12)
    assert step(1) == ((1, Node(0, 0)),)
