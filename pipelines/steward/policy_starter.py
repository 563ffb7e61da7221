"""The policy that `silotune policy new` writes: a federation's own facts as the rules, each explained, for a steward to tighten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from silotune.components.errors import FederationError
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR
from silotune.components.steward.policy import Policy
from silotune.components.terms.privacy import Privacy

TEXT = """\
# What may be done with this silo's records, whatever a coordinator asks. Only the silo's steward changes it.
# It lies in the silo's storage as policy.yaml, in its ConfigMap silotune-federation, or where SILOTUNE_POLICY says.
#   silotune review FEDERATION --policy policy.yaml     what a federation asks for against it
# A rule that is left out restricts nothing. Filled in here: what federation {name} asks for today.

{dataset}

{coordinators}
{bases}
{images}
strategies: [{strategy}]
codecs: [{codec}]

privacy:
{required}
{unit}
{budget}

{secure}
{participants}
# report: [steps, seconds, epsilon, delta]    # numbers that reports may hold; left out: all that are known
# scores: false               # keep even the sums of losses on valid and test
# min_scored: 20              # or: tell them of so many examples together at least
# max_update_bytes: 50_000_000
# max_runs: 3                 # federations that may ever train on the data
# expires: 2027-12-31         # first day on which nothing is allowed any more

# ledger:
#   at: /srv/silotune/ledger  # one place for all federations that use the data, where they have a storage each
"""


def write(file: Path, federation: Federation, silo_id: str, base: str | None, images: Sequence[str]) -> None:
    """Write a policy that lets this federation through.

    Args:
        base: digest of the base model, where it is known here.
        images: that the silo's work may run in, by digest; none where it runs outside of a container.

    Raises:
        FederationError: there is a file already, or it cannot be written.
    """
    keys = [key.public for key in federation.public_keys_of(COORDINATOR)] if federation.security.keys else []
    digests = [image.rpartition("@")[2] for image in images]
    privacy = federation.privacy

    def rule(name: str, values: list[str], what: str) -> str:
        return f"{name}: [{', '.join(values)}]" if values else f"# {name}: [{what}]"

    text = TEXT.format(
        name=federation.name, strategy=federation.aggregation.strategy, codec=federation.communication.codec,
        dataset=_line(f"dataset: {silo_id}", "your name of the data; budgets are counted by it, however the records change"),
        coordinators=rule("coordinators", [f'"{k}"' for k in keys], "ed25519:…: the coordinator's public key"),
        bases=rule("bases", [base] if base else [], "the base model's SHA-256, which silotune policy new fills in where the base is a local folder"),
        images=rule("images", [f'"{digest}"' for digest in digests], "sha256:…: what the silo's work runs in"),
        required=_line(f"  required: {_word(privacy.of_records)}", "refuse trainings without record-level differential privacy"),
        unit=_line(f"  unit: {privacy.unit}", "whose traces count: record, or person: all records of a person together"),
        budget="\n".join(_budget(privacy)),
        secure=_line(f"secure_aggregation: {_word(privacy.secure_aggregation is not None)}", "true: refuse federations whose coordinator sees single updates"),
        participants=_line(f"min_participants: {federation.quorum.count}", "silos that a round must ask at least"),
    )  # fmt: skip
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise FederationError(f"{file}: exists already; give another name, or move it away") from None
    except OSError as error:
        raise FederationError(f"{file}: cannot be written: {error.strerror}; give a place you may write to") from None
    Policy.load(file)


def _budget(privacy: Privacy) -> Iterator[str]:
    """What the federation asks for as the limit; comments where it asks for none."""
    asked = privacy.epsilon
    off = "  " if asked else "  # "
    yield _line(f"{off}epsilon:", "bounds on what all trainings together may say about one of them")
    yield _line(f"{off}  run: {3.0 if asked is None else asked}", "of one federation, over all its rounds")
    yield _line("  #   month: 3.0", "of a calendar month (UTC)")
    yield _line(f"{off}  total: {10.0 if asked is None else asked}", "of all, ever: `silotune privacy` shows what is left")
    yield _line(f"{off}  delta: {1e-6 if asked is None else privacy.delta}", "the chance that a bound does not hold")


def _line(text: str, comment: str) -> str:
    return f"{text:<28}  # {comment}"


def _word(value: bool) -> str:
    return str(value).lower()
