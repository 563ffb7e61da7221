"""Who can talk to whom, computed from network policies as Kubernetes reads them: what a pod is selected by is all that it may."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class End:
    """A pod by its namespace and labels, or, without a namespace, an address outside the cluster's pods."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


class Network:
    """The policies of several builds, and the labels of their namespaces."""

    def __init__(self, *builds: list[Object]) -> None:
        objects = [o for build in builds for o in build]
        self.policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
        self._namespaces = {o["metadata"]["name"]: o["metadata"].get("labels", {}) for o in objects if o["kind"] == "Namespace"}

    def reaches(self, source: End, target: End, port: int, protocol: str = "TCP") -> bool:
        """Both sides must let it pass; a pod that no policy selects in a direction is open in it."""
        return self._passes("Egress", "to", source, target, port, protocol) and self._passes(
            "Ingress", "from", target, source, port, protocol
        )

    def _passes(self, direction: str, peers: str, pod: End, other: End, port: int, protocol: str) -> bool:
        if not pod.namespace:
            return True
        mine = [
            p["spec"] for p in self.policies
            if p["metadata"]["namespace"] == pod.namespace and direction in p["spec"]["policyTypes"] and fits(p["spec"]["podSelector"], pod.labels)
        ]  # fmt: skip
        rules = [rule for spec in mine for rule in spec.get(direction.lower(), [])]
        return not mine or any(
            ("ports" not in rule or any(_is_open(p, port, protocol) for p in rule["ports"]))
            and (peers not in rule or any(self._is(peer, pod.namespace, other) for peer in rule[peers]))
            for rule in rules
        )

    def _is(self, peer: Object, namespace: str, other: End) -> bool:
        if block := peer.get("ipBlock"):
            return bool(other.address) and ipaddress.ip_address(other.address) in ipaddress.ip_network(block["cidr"])
        if not other.namespace:
            return False
        labels = {"kubernetes.io/metadata.name": other.namespace} | self._namespaces.get(other.namespace, {})
        same = fits(peer["namespaceSelector"], labels) if "namespaceSelector" in peer else other.namespace == namespace
        return same and fits(peer.get("podSelector", {}), other.labels)


def _is_open(rule: Object, port: int, protocol: str) -> bool:
    return bool(rule["protocol"] == protocol and rule["port"] <= port <= rule.get("endPort", rule["port"]))


def fits(selector: Object, labels: dict[str, str]) -> bool:
    for e in selector.get("matchExpressions", []):
        assert e["operator"] == "In", f"not computed here: {e}"
        if labels.get(e["key"]) not in e["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
