"""Aggregation, as terms: the strategies, the robust rules, what each of them can be combined with, and the section of the file that chooses.

`STRATEGIES` and `RULES` are the composition table. `silotune strategies` prints it, and `conflicts` refuses by it what cannot hold, before
anything reaches a silo. The arithmetic is in `learning.aggregation`; nothing here needs more than pydantic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from silotune.components.terms.section import Fraction, Positive, Section

Local = Literal["plain", "proximal", "dynamic", "control"]
Sends = Literal["all", "b", "alternate", "core"]
Combine = Literal["mean", "product", "fold", "stack"]
Server = Literal["add", "momentum", "nesterov", "adagrad", "yogi", "adam", "control", "dynamic"]


@dataclass(frozen=True)
class Strategy:
    """One way from updates to the next global: what is trained, how updates are combined, what the server does with the result."""

    paper: str
    what: str
    local: Local = "plain"  # term that is added to the silo's own loss or gradient
    sends: Sends = "all"  # tensors that are trained and sent
    combine: Combine = "mean"
    server: Server = "add"
    by_steps: bool = False  # each update counts per local step
    lora_only: bool = False
    exact: str = "no"  # whether the mean of LoRA products comes out

    @property
    def memory(self) -> bool:
        """Whether a silo's update carries tensors that its next round needs."""
        return self.local in ("control", "dynamic")

    @property
    def folds(self) -> bool:
        """Whether the global corrects the base's own weights, so that an adapter alone is not the model."""
        return self.combine in ("fold", "stack")

    @property
    def unequal_ranks(self) -> bool:
        return self.combine in ("product", "stack")

    @property
    def linear(self) -> bool:
        """Whether the next global depends on nothing but one weighted sum of what silos send: trees and secure aggregation need that."""
        return self.combine == "mean"

    @property
    def record_privacy(self) -> bool:
        """Whether differentially private local gradients keep their bound: what silos send must be made from these alone."""
        return not self.memory

    @property
    def takes_rules(self) -> bool:
        """Whether a robust rule can stand in the mean's place; what is carried beside the updates has none."""
        return not self.memory and not self.folds and not self.by_steps


FEDAVG = "McMahan et al. 2017, arXiv:1602.05629"
FEDOPT = "Reddi et al. 2020, arXiv:2003.00295"

STRATEGIES: dict[str, Strategy] = {
    "fedavg": Strategy(FEDAVG, "weighted mean of the differences"),
    "fedprox": Strategy("Li et al. 2018, arXiv:1812.06127", "fedavg; silos are held near the global by mu/2 ‖θ - θ₀‖²", local="proximal"),
    "feddyn": Strategy("Acar et al. 2021, arXiv:2111.04263", "silos' losses are bent to agree at the optimum", local="dynamic", server="dynamic"),
    "scaffold": Strategy("Karimireddy et al. 2019, arXiv:1910.06378", "control variates against drift", local="control", server="control"),
    "fednova": Strategy("Wang et al. 2020, arXiv:2007.07481", "unequal numbers of local steps without bias", by_steps=True),
    "fedavgm": Strategy("Hsu et al. 2019, arXiv:1909.06335", "fedavg with momentum at the server", server="momentum"),
    "fedadagrad": Strategy(FEDOPT, "Adagrad at the server", server="adagrad"),
    "fedyogi": Strategy(FEDOPT, "Yogi at the server", server="yogi"),
    "fedadam": Strategy(FEDOPT, "Adam at the server", server="adam"),
    "diloco": Strategy("Douillard et al. 2023, arXiv:2311.08105", "many local AdamW steps, Nesterov at the server", server="nesterov"),
    "fedit": Strategy("Zhang et al. 2023, arXiv:2305.05644", "LoRA's A and B averaged apart, which is biased", lora_only=True),
    "ffa": Strategy("Sun et al. 2024, arXiv:2403.12313", "A stays as it began, B is trained and sent", sends="b", lora_only=True, exact="yes"),
    "rolora": Strategy(
        "Chen et al. 2024, arXiv:2409.02346", "B in odd rounds, A in even ones", sends="alternate", lora_only=True, exact="yes"
    ),
    "fed-sb": Strategy(
        "Singhal et al. 2025, arXiv:2502.15436", "an r × r core between fixed subspaces", sends="core", lora_only=True, exact="yes"
    ),
    "flora": Strategy(
        "Wang et al. 2024, arXiv:2409.05976", "products are added to the base, adapters begin anew", combine="stack", lora_only=True, exact="yes"
    ),
    "fedex": Strategy(
        "Singhal et al. 2024, arXiv:2410.09432", "fedit, and what it misses is added to the base", combine="fold", lora_only=True, exact="yes"
    ),
    "product": Strategy(
        "Eckart & Young 1936, doi:10.1007/BF02288367", "best rank-r approximation of the mean product", combine="product", lora_only=True,
        exact="best of rank r",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """A robust rule: what it does in the mean's place, and how many silos it needs against ``f`` hostile ones."""

    paper: str
    what: str
    kind: Literal["weights", "coordinates"]  # chooses silos' weights, or works number by number
    least: Mapping[str, int]  # silos needed: {"silos": a, "hostile": b} for a + b·f


def _needs(silos: int, hostile: int) -> dict[str, int]:
    return {"silos": silos, "hostile": hostile}


RULES: dict[str, Rule] = {
    "norm-bound": Rule("Sun et al. 2019, arXiv:1911.07963", "updates are scaled down to a bound on their norm", "weights", _needs(1, 1)),
    "median": Rule("Yin et al. 2018, arXiv:1803.01498", "median, number by number", "coordinates", _needs(1, 2)),
    "trimmed-mean": Rule("Yin et al. 2018, arXiv:1803.01498", "mean without the f greatest and least", "coordinates", _needs(1, 2)),
    "geometric-median": Rule("Pillutla et al. 2019, arXiv:1912.13445", "least sum of distances", "weights", _needs(1, 2)),
    "krum": Rule("Blanchard et al. 2017, arXiv:1703.02757", "the one update nearest to its neighbours", "weights", _needs(3, 2)),
    "multi-krum": Rule("Blanchard et al. 2017, arXiv:1703.02757", "mean of the n - f best by Krum's score", "weights", _needs(3, 2)),
    "bulyan": Rule("El Mhamdi et al. 2018, arXiv:1802.07927", "Krum's choice, then trimmed number by number", "coordinates", _needs(3, 4)),
    "foolsgold": Rule("Fung et al. 2018, arXiv:1808.04866", "silos that keep saying the same count less", "weights", _needs(1, 1)),
    "fltrust": Rule("Cao et al. 2020, arXiv:2012.13995", "silos count by their agreement with a trusted one", "weights", _needs(1, 1)),
}


class ServerStep(Section):
    """What the server does with the combined update: step size and memory of its optimiser."""

    learning_rate: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Step size; default: 1, with diloco 0.7, with fedadagrad, fedyogi and fedadam 0.01."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Momentum, or decay of the first moment.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment.")
    tau: float = Field(1e-3, gt=0, allow_inf_nan=False, description="Adaptivity: added to the root of the second moment.")


class Robust(Section):
    """A rule that stands in the mean's place and bears with hostile or broken silos."""

    rule: Literal[
        "norm-bound", "median", "trimmed-mean", "geometric-median", "krum", "multi-krum", "bulyan", "foolsgold", "fltrust"
    ] = Field(description="See `silotune strategies`.")  # fmt: skip
    hostile: Positive = Field(1, description="Silos that may be hostile at most, f.")
    bound: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="`norm-bound` only: L2 norm of an update at most; default: the median of this round's."
    )
    trusted: str | None = Field(None, description="`fltrust` only: id of the silo whose update is the reference.")


class Clip(Section):
    """Bounds every update's L2 norm before it is combined."""

    norm: float | None = Field(None, gt=0, allow_inf_nan=False, description="Fixed bound.")
    quantile: Fraction | None = Field(
        None, description="Instead: a bound that follows this quantile of the norms (Andrew et al. 2021, arXiv:1905.03871)."
    )
    initial: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="`quantile` only: its first bound; default: that quantile of the first round's norms, and 0.1 with `privacy.silo`, which "
        "may not look at them.",
    )


def _without_default(schema: dict[str, Any]) -> None:
    """The default is not one value: see `chosen`."""
    schema.pop("default", None)


class Aggregation(Section):
    """How updates become the next global model."""

    strategy: Literal[
        "fedavg", "fedprox", "feddyn", "scaffold", "fednova", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "diloco",
        "fedit", "ffa", "rolora", "fed-sb", "flora", "fedex", "product",
    ] = Field(
        "fedavg", json_schema_extra=_without_default,
        description="See `silotune strategies`. Default: `product` with LoRA; `fedavg` with full fine-tuning, and where `fan_in`, "
        "`privacy.silo` or `privacy.secure_aggregation` ask for a plain sum.",
    )  # fmt: skip
    weights: Literal["examples", "tokens", "uniform"] = Field(
        "examples", description="An update counts by the examples, or response tokens, it has seen, or as one."
    )
    mu: float = Field(
        0.01, gt=0, allow_inf_nan=False, description="`fedprox`: weight of the proximal term; `feddyn`: weight of its regulariser (α)."
    )
    server: ServerStep = Field(default_factory=ServerStep, description="Strategies with an optimiser at the server.")
    carry: bool = Field(False, description="`product` only: what rank r cannot hold is added to the next round's sum.")
    zeroing: bool = Field(False, description="Updates far larger than usual count as zero.")
    clip: Clip | None = Field(None, description="Bound on each update's norm.")
    robust: Robust | None = Field(None, description="A robust rule in the mean's place.")
    fan_in: Annotated[int, Field(ge=2)] = Field(
        16, description="Updates summed in one group; with more silos than that, groups are summed by tasks of their own. Means only."
    )

    @property
    def traits(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def server_rate(self) -> float:
        """Step size of the server: as given, or the usual one of the strategy."""
        usual = {"nesterov": 0.7, "adagrad": 0.01, "yogi": 0.01, "adam": 0.01}
        return self.server.learning_rate if self.server.learning_rate is not None else usual.get(self.traits.server, 1.0)

    @property
    def weighs_alike(self) -> bool:
        """Whether every silo counts as one. With feddyn always: it is no mean of weighted silos in the paper, and has no such form."""
        return self.weights == "uniform" or self.traits.server == "dynamic"

    @property
    def tree(self) -> bool:
        """Whether sums of groups are sums of the whole."""
        return self.traits.linear and self.robust is None and self.clip is None and not self.zeroing

    def groups(self, silos: Iterable[str]) -> tuple[tuple[str, ...], ...]:
        """Whose updates are summed first, apart from the others': runs of ``fan_in`` in the sorted order of ids; empty where one sum will do.

        Args:
            silos: all that a plan asks, whether they deliver or not, so that nobody's group depends on who is missing.
        """
        ids = sorted(silos)
        if not self.tree or len(ids) <= self.fan_in:
            return ()
        return tuple(tuple(ids[at : at + self.fan_in]) for at in range(0, len(ids), self.fan_in))


def chosen(raw: Mapping[str, Any]) -> Any:
    """The strategy of a federation file, on raw values: what it names, or the one that is used where it names none.

    Of those that need no other learning rate than fedavg's, product did best on silos that differ (docs/benchmarks.md).
    """
    terms, model, privacy = (found if isinstance(found := raw.get(key), dict) else {} for key in ("aggregation", "model", "privacy"))
    if "strategy" in terms:
        return terms["strategy"]
    summed = "fan_in" in terms or any(privacy.get(key) is not None for key in ("silo", "secure_aggregation"))
    return "fedavg" if summed or model.get("method") == "full" else "product"


def conflicts(raw: Mapping[str, Any]) -> Iterator[str]:
    """What of a federation file's aggregation cannot hold together, on raw values; each with its place, the rule and the cure."""
    terms = raw.get("aggregation") if isinstance(raw.get("aggregation"), dict) else {}
    assert isinstance(terms, dict)
    name = chosen(raw)
    if not isinstance(name, str) or name not in STRATEGIES:
        return  # told by the field itself
    strategy = STRATEGIES[name]
    model = raw.get("model") if isinstance(raw.get("model"), dict) else {}
    assert isinstance(model, dict)
    full = model.get("method", "lora") == "full"
    if full and strategy.lora_only:
        plain = ", ".join(n for n, s in STRATEGIES.items() if not s.lora_only)
        yield f"aggregation.strategy: {name} is for LoRA, and model.method is full; choose one of {plain}"
    yield from _rank_conflicts(raw, name, strategy, full)
    export = raw.get("export") if isinstance(raw.get("export"), dict) else {}
    if strategy.folds and isinstance(export, dict) and not export.get("merge"):
        yield f"export.merge: must be true with aggregation.strategy {name}, which changes the base's own weights; set it"
    if terms.get("mu", usual := Aggregation.model_fields["mu"].default) != usual and strategy.local not in ("proximal", "dynamic"):
        yield f"aggregation.mu: is for fedprox and feddyn, got it with {name}; remove it"
    yield from _weight_conflicts(terms, name, strategy)
    if _differs(terms.get("server"), ServerStep()) and strategy.server in ("add", "control", "dynamic"):
        users = ", ".join(n for n, s in STRATEGIES.items() if s.server not in ("add", "control", "dynamic"))
        yield f"aggregation.server: is for {users}, got it with {name}; remove it"
    yield from _unused_steps(terms.get("server"), name, strategy)
    if terms.get("carry") and strategy.combine != "product":
        yield f"aggregation.carry: is for product, got it with {name}; remove it"
    clip = terms.get("clip")
    if isinstance(clip, dict) and (clip.get("norm") is None) == (clip.get("quantile") is None):
        yield "aggregation.clip: must hold either norm or quantile; give one of them"
    if isinstance(clip, dict) and clip.get("initial") is not None and clip.get("quantile") is None:
        yield f"aggregation.clip.initial: is for quantile, got {clip['initial']} without; remove it"
    for key in ("clip", "zeroing"):
        if terms.get(key) and (strategy.memory or strategy.folds or strategy.by_steps):
            why = "which weighs updates by their steps" if strategy.by_steps else "whose updates are more than one difference"
            yield f"aggregation.{key}: cannot hold with {name}, {why}; choose another strategy"
        if terms.get(key) and terms.get("carry") and strategy.combine == "product":
            yield f"aggregation.carry: cannot hold with {key}, which has no part for what is carried; remove one of them"
    if terms.get("robust") and terms.get("carry") and strategy.combine == "product":
        yield "aggregation.carry: cannot hold with robust, since what is carried would come from no silo; remove one of them"
    yield from _tree_conflicts(raw, terms, name, strategy)
    if isinstance(robust := terms.get("robust"), dict):
        yield from _rule_conflicts(raw, robust, name, strategy, full)


def _tree_conflicts(raw: Mapping[str, Any], terms: Mapping[str, Any], name: str, strategy: Strategy) -> Iterator[str]:
    """Groups of updates that were asked for, and cannot be summed apart."""
    fan_in, silos = terms.get("fan_in"), raw.get("silos")
    count = len(silos) if isinstance(silos, list) else 0
    if not isinstance(fan_in, int) or fan_in == Aggregation.model_fields["fan_in"].default or count <= fan_in:
        return
    found = [key for key in ("robust", "clip", "zeroing") if terms.get(key)]
    if not strategy.linear:
        able = ", ".join(n for n, s in STRATEGIES.items() if s.linear)
        yield f"aggregation.fan_in: is for means, which groups of silos can make apart, got {fan_in} with {name}; remove it, or choose one of {able}"
    elif found:
        what = " and ".join(found)
        yield f"aggregation.fan_in: cannot hold with {what}, which must see all updates side by side, got {fan_in} for {count} silos; remove one of them"


def _weight_conflicts(terms: Mapping[str, Any], name: str, strategy: Strategy) -> Iterator[str]:
    """Weights that a strategy with memory cannot count by."""
    weights = terms.get("weights")
    if strategy.server == "dynamic" and weights not in (None, "uniform"):
        yield f"aggregation.weights: {name} counts every silo as one, got {weights}; remove it, or choose scaffold"
    if strategy.server == "control" and weights == "tokens":
        yield f"aggregation.weights: tokens are not known beforehand, as the weights of {name}'s control variates must be; set examples or uniform"


USED: dict[str, set[str]] = {  # server -> what of `aggregation.server` it goes by
    "momentum": {"learning_rate", "beta1"}, "nesterov": {"learning_rate", "beta1"}, "adagrad": {"learning_rate", "tau"},
}  # fmt: skip


def _unused_steps(server: Any, name: str, strategy: Strategy) -> Iterator[str]:
    """Settings of the server's step that would change nothing."""
    used = USED.get(strategy.server)
    if used is None or not isinstance(server, dict):
        return
    for key in sorted(server.keys() & ServerStep.model_fields.keys() - used):
        if server[key] != ServerStep.model_fields[key].default:
            yield f"aggregation.server.{key}: has no part in {name}, which goes by {' and '.join(sorted(used))}; remove it"


def _differs(given: Any, usual: Section) -> bool:
    """Whether a section says anything but the defaults."""
    return isinstance(given, dict) and any(value != getattr(usual, key, value) for key, value in given.items())


def _rank_conflicts(raw: Mapping[str, Any], name: str, strategy: Strategy, full: bool) -> Iterator[str]:
    model = raw.get("model")
    lora = model.get("lora") if isinstance(model, dict) else None
    most = lora.get("r", 8) if isinstance(lora, dict) else 8
    silos = raw.get("silos")
    for i, silo in enumerate(silos if isinstance(silos, list) else []):
        own = silo.get("lora") if isinstance(silo, dict) else None
        rank = own.get("r") if isinstance(own, dict) else None
        if not isinstance(rank, int):
            continue
        where = f"silos[{i}].lora.r"
        if full:
            yield f"{where}: is for LoRA, and model.method is full; remove it"
        elif isinstance(most, int) and rank > most:
            yield f"{where}: must be at most model.lora.r, {most}, got {rank}; the global holds no more"
        elif rank != most and not strategy.unequal_ranks:
            able = ", ".join(n for n, s in STRATEGIES.items() if s.unequal_ranks)
            yield f"{where}: must be model.lora.r, {most}, with aggregation.strategy {name}, got {rank}; choose {able} for unequal ranks"


def _rule_conflicts(raw: Mapping[str, Any], robust: dict[str, Any], name: str, strategy: Strategy, full: bool) -> Iterator[str]:
    rule_name = robust.get("rule")
    rule = RULES.get(rule_name) if isinstance(rule_name, str) else None
    if rule is None:
        return  # told by the field itself
    where = "aggregation.robust"
    if not strategy.takes_rules:
        able = ", ".join(n for n, s in STRATEGIES.items() if s.takes_rules)
        yield f"{where}: cannot hold with {name}, which needs a mean of what silos send; choose one of {able}"
    elif rule.kind == "coordinates" and not full and strategy.sends == "all" and strategy.combine != "product":
        yield f"{where}.rule: {rule_name} works on LoRA's products, which {name} does not make; set aggregation.strategy: product"
    silos = raw.get("silos")
    ids = [s.get("id") for s in silos if isinstance(s, dict)] if isinstance(silos, list) else []
    hostile = robust.get("hostile", 1)
    if isinstance(hostile, int) and hostile >= 1 and len(ids) < (least := rule.least["silos"] + rule.least["hostile"] * hostile):
        yield f"{where}: {rule_name} needs {least} silos against {hostile} hostile, got {len(ids)}; lower hostile or choose another rule"
    trusted = robust.get("trusted")
    if rule_name == "fltrust" and trusted not in ids:
        yield f"{where}.trusted: must be the id of a silo with fltrust, got {trusted!r}; name one that is above suspicion"
    if rule_name != "fltrust" and trusted is not None:
        yield f"{where}.trusted: is for fltrust, got it with {rule_name}; remove it"
    if rule_name != "norm-bound" and robust.get("bound") is not None:
        yield f"{where}.bound: is for norm-bound, got it with {rule_name}; remove it"
