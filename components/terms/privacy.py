"""Privacy, as terms: the section of the file that promises it, and what cannot be promised together.

Three promises, each by itself or together with others:

    epsilon              record-level: a silo's update says almost nothing about any one record, or person (Abadi et al. 2016, arXiv:1607.00133)
    silo                 silo-level: a global says almost nothing about whether a silo took part (McMahan et al. 2018, arXiv:1710.06963)
    secure_aggregation   the coordinator sees no update, only their sum (Bonawitz et al. 2017, doi:10.1145/3133956.3133982)

Noise is never typed in: it follows from epsilon, delta, the clip and how often records are used. The arithmetic is in `learning.privacy`;
nothing here needs more than pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from silotune.components.terms.section import Positive, Section
from silotune.components.terms.strategies import STRATEGIES, Strategy, chosen

MAX_GRAD_NORM = 1.0  # of `training`, unless the file says another


class SiloPrivacy(Section):
    """Silo-level differential privacy: noise on what the silos' clipped updates add up to. The clip is `aggregation.clip`."""

    epsilon: float = Field(gt=0, allow_inf_nan=False, description="Bound ε on what all planned rounds together say about one silo's part.")
    delta: float = Field(1e-5, gt=0, lt=1, description="Probability δ that the bound does not hold.")
    mechanism: Literal["gaussian", "tree", "discrete-gaussian"] = Field(
        "gaussian",
        description="Noise by the coordinator, anew each round or as a tree over the rounds (DP-FTRL), or by the silos "
        "themselves under secure aggregation, with nobody to trust.",
    )


class SecureAggregation(Section):
    """The coordinator gets the sum of the updates, and nothing of any one of them. Silos clip by `aggregation.clip.norm` themselves."""

    threshold: Positive | None = Field(
        None, description="Silos that must answer for a sum to be opened; default: two thirds of the silos, rounded down, and one."
    )
    bits: int = Field(
        24, ge=8, le=40, description="Fractional precision of an update's numbers: how finely the clip is divided, as a power of 2."
    )


class Privacy(Section):
    """What is promised about records and silos; see docs/privacy.md."""

    unit: Literal["record", "person"] = Field(
        "record", description="Whose traces epsilon bounds: one record's, or all records of a person."
    )
    person_field: str | None = Field(
        None, description="Column that says whose record it is, with `unit: person`. It never leaves the silo."
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Bound ε on what all planned rounds say about a unit of one silo; default: no such promise.",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Probability δ that the bound does not hold; well below one by the silo's units.")
    clip: float = Field(1.0, gt=0, allow_inf_nan=False, description="L2 norm that the gradient of a unit is clipped to.")
    clipping: Literal["flat", "per-layer", "automatic", "adaptive"] = Field(
        "flat",
        description="One bound for all tensors, the same shared out over the tensors, every gradient scaled to the bound (Bu et al. 2022), "
        "or a bound that follows the median of the norms at a share of ε (Andrew et al. 2021).",
    )
    rounds: Positive | None = Field(None, description="Rounds that epsilon is planned for; default: `rounds.total`.")
    silo: SiloPrivacy | None = Field(None, description="Silo-level privacy.")
    secure_aggregation: SecureAggregation | None = Field(None, description="Sum updates without seeing them.")

    @property
    def of_records(self) -> bool:
        """Whether training is differentially private."""
        return self.epsilon is not None


def threshold_of(terms: SecureAggregation, silos: int) -> int:
    """Silos t of n that must sign the same set of survivors, and whose shares open its sum."""
    return terms.threshold if terms.threshold is not None else 2 * silos // 3 + 1


def most_in_league(terms: SecureAggregation, silos: int) -> int:
    """Silos c that may be in league with the coordinator: no two sets get t signatures each where 2t > n + c (Bonawitz et al. 2017, section 6)."""
    return 2 * threshold_of(terms, silos) - silos - 1


def sums_securely(strategy: Strategy) -> bool:
    """Whether a strategy needs nothing of the updates but one sum with weights that are known beforehand."""
    return strategy.linear and not strategy.memory and not strategy.by_steps


def conflicts(raw: Mapping[str, Any]) -> Iterator[str]:
    """What of a federation file's privacy cannot hold together, on raw values; each with its place, the rule and the cure."""
    terms, aggregation, training = (_mapping(raw, key) for key in ("privacy", "aggregation", "training"))
    if not terms:
        return
    name = chosen(raw)
    if not isinstance(name, str) or name not in STRATEGIES:
        return  # told by the field itself
    strategy, weights = STRATEGIES[name], aggregation.get("weights", "examples")
    if terms.get("unit") == "person" and not terms.get("person_field"):
        yield "privacy.person_field: is required with privacy.unit: person; name the column that says whose record it is"
    if terms.get("unit", "record") == "record" and terms.get("person_field"):
        yield "privacy.person_field: is for privacy.unit: person, got it with record; set the unit, or remove it"
    if terms.get("epsilon") is not None:
        yield from _record_conflicts(name, strategy, weights, training)
    elif used := [
        key for key in ("unit", "clip", "clipping", "rounds") if _given(terms, key) and not (key == "rounds" and terms.get("silo"))
    ]:
        yield f"privacy.{used[0]}: is for record-level privacy, which privacy.epsilon asks for, got it without; add epsilon, or remove it"
    if (silo := terms.get("silo")) is not None:
        yield from _silo_conflicts(silo, terms, aggregation, name, strategy, weights)
        if _mapping(_mapping(raw, "rounds"), "guards").get("norm_band") is not None:
            yield "rounds.guards.norm_band: cannot hold with privacy.silo, where no silo's norm may decide on another's part; remove it"
    if terms.get("secure_aggregation") is not None:
        yield from _secure_conflicts(raw, _mapping(terms, "secure_aggregation"), aggregation, name, strategy)


def _record_conflicts(name: str, strategy: Strategy, weights: str, training: Mapping[str, Any]) -> Iterator[str]:
    if not strategy.record_privacy:
        able = ", ".join(n for n, s in STRATEGIES.items() if s.record_privacy)
        yield f"privacy.epsilon: cannot hold with aggregation.strategy {name}, whose silos send more than private gradients make; choose {able}"
    if weights == "tokens":
        yield "privacy.epsilon: cannot hold with aggregation.weights: tokens, which tells how long records are; set examples or uniform"
    if training.get("max_grad_norm", MAX_GRAD_NORM) != MAX_GRAD_NORM:
        yield "training.max_grad_norm: has no meaning with privacy.epsilon, where privacy.clip bounds every unit's gradient; remove it"


def _silo_conflicts(
    silo: Any, terms: Mapping[str, Any], aggregation: Mapping[str, Any], name: str, strategy: Strategy, weights: str
) -> Iterator[str]:
    mechanism = silo.get("mechanism", "gaussian") if isinstance(silo, dict) else "gaussian"
    if not strategy.linear or not strategy.record_privacy or strategy.by_steps:
        able = ", ".join(n for n, s in STRATEGIES.items() if sums_securely(s))
        yield f"privacy.silo: needs a mean of what silos send, got aggregation.strategy {name}; choose one of {able}"
    if not aggregation.get("clip"):
        yield "privacy.silo: needs aggregation.clip, which bounds what one silo can add; set clip.norm or clip.quantile"
    if weights != "uniform":
        yield f"privacy.silo: needs aggregation.weights: uniform, so that no silo counts more, got {weights}; set it"
    if aggregation.get("robust"):
        yield "privacy.silo: cannot hold with aggregation.robust, whose choice of silos no noise covers; remove one of them"
    if aggregation.get("zeroing"):
        yield "privacy.silo: cannot hold with aggregation.zeroing, whose bound no noise covers; remove zeroing"
    secure = terms.get("secure_aggregation") is not None
    if mechanism == "discrete-gaussian" and not secure:
        yield "privacy.silo.mechanism: discrete-gaussian is for privacy.secure_aggregation, got it without; add that, or choose gaussian"
    if mechanism != "discrete-gaussian" and secure:
        yield f"privacy.silo.mechanism: must be discrete-gaussian with privacy.secure_aggregation, got {mechanism}; set it"
    if mechanism == "tree" and strategy.sends == "alternate":
        yield f"privacy.silo.mechanism: tree needs the same tensors in every round, got aggregation.strategy {name}; choose gaussian"
    if mechanism == "tree" and _mapping(aggregation, "clip").get("quantile") is not None:
        yield "privacy.silo.mechanism: tree needs a fixed bound, got aggregation.clip.quantile; set clip.norm"


def _secure_conflicts(
    raw: Mapping[str, Any], secure: Mapping[str, Any], aggregation: Mapping[str, Any], name: str, strategy: Strategy
) -> Iterator[str]:
    where, silos = "privacy.secure_aggregation", raw.get("silos")
    count = len(silos) if isinstance(silos, list) else 0
    if not sums_securely(strategy):
        able = ", ".join(n for n, s in STRATEGIES.items() if sums_securely(s))
        yield f"{where}: needs a strategy that is one sum, got {name}; choose one of {able}"
    clip = _mapping(aggregation, "clip")
    if clip.get("norm") is None:
        yield f"{where}: needs aggregation.clip.norm, by which silos clip and scale what they mask; set it"
    if aggregation.get("weights", "examples") == "tokens":
        yield f"{where}: cannot hold with aggregation.weights: tokens, which nobody knows beforehand; set examples or uniform"
    for key in ("robust", "zeroing"):
        if aggregation.get(key):
            yield f"{where}: cannot hold with aggregation.{key}, which must see updates; remove one of them"
    if "fan_in" in aggregation and isinstance(aggregation["fan_in"], int) and count > aggregation["fan_in"]:
        yield f"{where}: cannot hold with aggregation.fan_in, since masks cancel in the whole sum only; remove fan_in"
    if count < 3:
        yield f"{where}: needs three silos, since of two each can subtract its own, got {count}; add silos"
    threshold = secure.get("threshold")
    if isinstance(threshold, int) and not (count < 2 * threshold and threshold <= count):
        yield f"{where}.threshold: must be more than half of the {count} silos and at most all, got {threshold}; else two sums could be opened"
    if _mapping(raw, "communication").get("codec", "float32") != "float32":
        yield f"{where}: sends whole numbers of its own, got communication.codec, which would only round them before; remove codec"
    if _mapping(raw, "security").get("signing") is False:
        yield f"{where}: cannot hold with security.signing: false, since keys that nobody signed are anybody's; set it true"
    if any(isinstance(s, dict) and _mapping(s, "lora").get("r") is not None for s in (silos if isinstance(silos, list) else [])):
        yield f"{where}: cannot hold with silos' own lora.r, since all must send the same shapes; remove them"


def _given(terms: Mapping[str, Any], key: str) -> bool:
    """Whether it says something else than the default."""
    return bool(terms.get(key, usual := Privacy.model_fields[key].default) != usual)


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = raw.get(key)
    return found if isinstance(found, dict) else {}
