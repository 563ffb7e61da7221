"""Releases: every sum that is published with silo-level noise, and what all of them together have spent.

A release is written down before its global is stored, and what has been written down counts as spent, whatever becomes of the global. It
names the updates it is of: a round that is gone on with after a crash sums the same ones again, with the same noise, to the same bytes,
and is not charged twice. Any other sum has other noise.

Noise is made of the coordinator's own secret: ``coordinator.noise`` in the folder that SILOTUNE_KEYS names, such as a mounted secret, or the file
that is made in its working folder. Whoever has it can take the noise off all globals.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from silotune.components import keys, silo_promise
from silotune.components.errors import FederationError, RefusedError
from silotune.components.federation import Agreement, Federation, canonical_json
from silotune.components.federation_file import COORDINATOR
from silotune.components.learning.aggregation.combination import Round
from silotune.components.learning.privacy import prefix_tree
from silotune.components.learning.privacy.noise import Noise
from silotune.components.learning.privacy.own_secret import BYTES, derive, own_secret
from silotune.components.learning.privacy.silo_noise import Layer, SiloNoise
from silotune.components.protocol import Plan, Release
from silotune.components.rounds import Rounds
from silotune.components.terms.privacy import SiloPrivacy

MOUNTED = f"{COORDINATOR}.noise"


@dataclass(frozen=True)
class Planned:
    """A release that may be made: what is combined with its noise, and its record."""

    given: Round
    release: Release


def secret_of(federation: Federation) -> bytes:
    """The coordinator's secret for noise.

    Raises:
        FederationError: the folder of its keys holds none, or not one of 32 bytes.
        SilotuneError: the one in its working folder cannot be read or made.
    """
    folder = os.environ.get(keys.FOLDER_VARIABLE)
    if not folder:
        return own_secret(federation.work)
    path = Path(folder) / MOUNTED
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise FederationError(
            f"{path}: the secret of privacy.silo's noise cannot be read: {error.strerror}; make one with `head -c 32 /dev/urandom > {MOUNTED}`, "
            f"put it beside {COORDINATOR}.pem, and keep it: without it a lost global cannot be made again",
            "no secret",
        ) from None
    if len(secret) != BYTES:
        raise FederationError(f"{path}: must hold {BYTES} random bytes, got {len(secret)}; make it anew", "no secret")
    return secret


def settled(rounds: Rounds, plan: Plan, delivered: Mapping[str, str]) -> set[str]:
    """Whose updates a round is summed of: all, or those of a sum that was made before without being committed.

    Args:
        delivered: silo -> digest of its update.
    """
    for release in rounds.releases():
        if release.plan == plan.digest and release.silos.items() <= delivered.items():
            return set(release.silos)
    return set(delivered)


def planned(federation: Federation, rounds: Rounds, plan: Plan, agreement: Agreement, given: Round, updates: Mapping[str, str]) -> Planned:
    """The noise of a round's sum: that of the release that stands for these very updates, or of a new one that the budget allows.

    Args:
        updates: silo -> digest of its update.

    Raises:
        RefusedError: the budget is spent.
        FederationError: there is no secret.
    """
    terms, total = agreement.privacy.silo, agreement.privacy.rounds
    assert terms is not None
    assert total is not None
    assert terms.mechanism != "discrete-gaussian"  # which is the silos' own
    standing = silo_promise.released(rounds)
    release = next((r for r in standing if r.plan == plan.digest and r.silos == dict(updates)), None)
    secret = secret_of(federation)
    noise, tree = _mechanism(terms, total, rounds, agreement, given, secret)
    if release is None:
        leaf = 1 + sum(r.tree == tree for r in standing) if tree else 0
        cost = (prefix_tree.squared_sensitivity(leaf) if tree else 1) / noise.multiplier**2
        before = silo_promise.spent_on(standing) + silo_promise.spent_on_secure_sums(rounds, plan.round)
        after = before + silo_promise.Spent(mu_squared=cost)
        if not after.within(terms):
            raise RefusedError(
                f"round {plan.round} stays open: privacy.silo: epsilon {terms.epsilon:g} at delta {terms.delta:g} was planned for {total} rounds, "
                f"and {before.epsilon(terms.delta):.4g} of it is spent; raise privacy.silo.epsilon, if the silos agree to that, or stop here",
                "budget",
            )
        release = Release(
            round=plan.round, number=len(standing) + 1, plan=plan.digest, silos=dict(updates), mechanism=terms.mechanism, tree=tree, leaf=leaf,
            noise_multiplier=noise.multiplier, mu_squared=cost, epsilon=after.epsilon(terms.delta), delta=terms.delta,
            at=time.time(),
        )  # fmt: skip
    return Planned(replace(given, noise=_keyed(noise, plan, agreement, secret, release)), release)


def write(rounds: Rounds, release: Release) -> None:
    """Raises RefusedError where another release has come first."""
    if rounds.write_release(release).silos != release.silos:
        raise RefusedError(f"round {release.round} stays open: another run is summing it too; run again once that has ended")


def guards(rounds: Rounds, release: Release) -> dict[str, float]:
    """What a commit says of it, and of all up to it."""
    mu = math.sqrt(silo_promise.spent_on([r for r in rounds.releases() if r.number <= release.number]).mu_squared)
    return {"silo epsilon": release.epsilon, "silo delta": release.delta, "silo release": float(release.number), silo_promise.MU: mu}


def again(
    federation: Federation | None, rounds: Rounds, plan: Plan, agreement: Agreement, given: Round, updates: Mapping[str, str]
) -> Round:
    """With the noise that a committed round's sum had.

    Raises:
        RefusedError: no release of these updates stands, or nobody's secret is at hand.
    """
    if federation is None:
        raise RefusedError(
            f"round {plan.round}: its noise is made of the coordinator's secret, which is not at hand; restore its global from a backup"
        )
    if not any(r.plan == plan.digest and r.silos == dict(updates) for r in rounds.releases()):
        raise RefusedError(f"round {plan.round}: no release of its updates is written down; restore the store's releases/ from a backup")
    return planned(federation, rounds, plan, agreement, given, updates).given


def _mechanism(terms: SiloPrivacy, total: int, rounds: Rounds, agreement: Agreement, given: Round, secret: bytes) -> tuple[SiloNoise, str]:
    """Noise without its keys, and the tree's name, "" where there is none.

    A tree is of one run of the federation, under one secret, with one deviation at every node: where any of that changes, another one begins.
    """
    clip, numbers = given.terms.clip, sum(math.prod(entry.shape) for entry in given.incoming.entries.values())
    noise = SiloNoise(silo_promise.noise_multiplier(terms, total), (), numbers, given.silos, given.terms.fan_in)
    if terms.mechanism == "gaussian":
        return noise, ""
    assert clip is not None
    assert clip.norm is not None
    owner = derive(secret, agreement="", plan="", incoming="", dataset="", purpose="silo tree: whose secret").hex()
    named = [agreement.federation, rounds.commit(0).digest, owner, terms.model_dump(), total, noise.for_bound(clip.norm).deviation]
    return noise, hashlib.sha256(canonical_json(named)).hexdigest()[:32]


def _keyed(noise: SiloNoise, plan: Plan, agreement: Agreement, secret: bytes, release: Release) -> SiloNoise:
    of = hashlib.sha256(canonical_json(release.silos)).hexdigest()

    def fresh(purpose: str) -> Noise:
        return Noise(derive(secret, agreement=plan.agreement, plan=plan.digest, incoming=plan.incoming, dataset=of, purpose=purpose))

    def node(at: prefix_tree.Node) -> Noise:
        where = f"silo tree node {at.level} {at.index}"
        return Noise(derive(secret, agreement="", plan="", incoming="", dataset=release.tree, purpose=where))

    if release.tree:
        return replace(noise, layers=[Layer(sign, node(at)) for sign, at in prefix_tree.step(release.leaf)])
    adaptive = agreement.aggregation.clip is not None and agreement.aggregation.clip.quantile is not None
    return replace(noise, layers=[Layer(1, fresh("silo sum"))], count=fresh("silo count") if adaptive else None)
