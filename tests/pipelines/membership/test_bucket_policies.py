"""Who may do what in a federation's bucket: as text, against moto's authorization, and against a real Ceph (marker `ceph`).

What is tried where:

    text    every kind of key by every party, with wildcards as IAM reads them; the conditions that demand If-None-Match and TLS
    moto    users, actions and keys. It knows no conditions (a statement with one denies all): it gets the policies without them, so that a
            silo may list all there. It takes keys for regular expressions, and gets `.` for `?`
    Ceph    the policies as they are, `s3:prefix` included. It does not know `s3:if-none-match`: an overwriting PUT is left to the text
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from typer.testing import CliRunner

from silotune.components.errors import FederationError, UnreachableError
from silotune.components.federation import Federation
from silotune.components.store.object_store import ObjectMissing
from silotune.components.store.s3_store import PART, S3Store
from silotune.pipelines.cli import app
from silotune.pipelines.membership import bucket_policies as policies

spec = importlib.util.spec_from_file_location("stores_to_test_with", Path(__file__).parents[2] / "components" / "conftest.py")
stores = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stores)
aws, gateway = stores.aws, stores.gateway  # fixtures

FILE = """
name: tiny
model: {base: ./base}
silos:
  - {id: north, train: ./n.jsonl}
  - {id: south, train: ./s.jsonl}
  - {id: plan, train: ./p.jsonl}
storage: {root: "ROOT"}
"""
SILOS = ("north", "south", "plan")  # one has the name of a record
D = hashlib.sha256(b"").hexdigest()
GIVEN = (f"agreements/{D}.json", f"objects/{D}", *(f"rounds/00003/{name}.json" for name in ("plan", "commit", "attempts/1", "attempts/12")))
PRIVATE = ("exports/0123-4567/model.safetensors", "exports/0123.json", "audit/000001.json", "tracking.json")
PROBE = "../.silotune-probe/0123"


def own(silo: str) -> tuple[str, ...]:
    return (
        *(f"rounds/00003/{name}.json" for name in (f"updates/{silo}", f"updates/{silo}.2", f"reports/1/{silo}", f"reports/12/{silo}")),
        f"evaluations/{D}/{silo}/valid-0123456789abcdef.json",
        f"contributions/{silo}/{D}",
    )


def refusals(silo: str) -> tuple[str, ...]:
    return (f"rounds/00003/refusals/{silo}.json", f"rounds/00003/refusals/{silo}.2.json")


def of_silos(keys: Callable[[str], tuple[str, ...]]) -> set[str]:
    return {key for silo in SILOS for key in keys(silo)}


EVERY = {*GIVEN, *PRIVATE, PROBE, *of_silos(own), *of_silos(refusals)}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Federation]:
    def write(root: str) -> Federation:
        (tmp_path / "f.yaml").write_text(FILE.replace("ROOT", root))
        return Federation.load(tmp_path / "f.yaml")

    return write


# --- as text ---


def fits(pattern: str, text: str) -> bool:
    """IAM's wildcards: `*` for any characters, `?` for one, slashes included."""
    return re.fullmatch("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern), text) is not None


def allowed(policy: dict[str, Any], action: str, root: str) -> set[str]:
    """Those of all keys that the policy allows an action on; for a listing, as its prefix."""
    found = set()
    for statement in policy["Statement"]:
        if statement["Effect"] == "Allow" and action == statement["Action"]:
            if action == "s3:ListBucket":
                assert statement["Resource"] == "arn:aws:s3:::bucket"
                patterns = [f"arn:aws:s3:::bucket/{p}" for p in statement["Condition"]["StringLike"]["s3:prefix"]]
            else:
                assert "Condition" not in statement
                patterns = statement["Resource"]
            found |= {key for key in EVERY if any(fits(p, arn(root, key)) for p in patterns)}
    return found


def arn(root: str, key: str) -> str:
    return "arn:aws:s3:::bucket/" + os.path.normpath(f"{root}tiny/{key}")


@pytest.mark.parametrize("root", ["", "team/a/"])
@pytest.mark.parametrize("silo", SILOS)
def test_a_silo_reads_what_it_is_given_and_creates_its_own_only(load: Callable[[str], Federation], silo: str, root: str) -> None:
    policy = policies.silo_policy(load(f"s3://bucket/{root}"), silo)
    assert allowed(policy, "s3:PutObject", root) == set(own(silo))
    assert allowed(policy, "s3:GetObject", root) == {*GIVEN, *own(silo), *refusals(silo)}
    assert allowed(policy, "s3:ListBucket", root) == {*GIVEN, *own(silo), *refusals(silo)}
    assert allowed(policy, "s3:AbortMultipartUpload", root) == {f"contributions/{silo}/{D}"}
    assert {s["Action"] for s in policy["Statement"]} == {"s3:PutObject", "s3:GetObject", "s3:ListBucket", "s3:AbortMultipartUpload"}


@pytest.mark.parametrize("root", ["", "team/a/"])
def test_the_coordinator_makes_the_course_and_erases_tensor_files_only(load: Callable[[str], Federation], root: str) -> None:
    policy = policies.coordinator_policy(load(f"s3://bucket/{root}"))
    assert allowed(policy, "s3:GetObject", root) == EVERY
    assert allowed(policy, "s3:ListBucket", root) == EVERY
    assert allowed(policy, "s3:PutObject", root) == EVERY - of_silos(own), "what a silo delivers, nobody else can have written"
    assert allowed(policy, "s3:DeleteObject", root) == {PROBE, f"objects/{D}", *(f"contributions/{silo}/{D}" for silo in SILOS)}
    actions = {s["Action"] for s in policy["Statement"]}
    assert actions == {"s3:PutObject", "s3:GetObject", "s3:ListBucket", "s3:AbortMultipartUpload", "s3:DeleteObject"}


def test_with_secure_aggregation_a_silo_reads_what_is_sealed_and_nothing_that_opens_a_sum(
    load: Callable[[str], Federation], tmp_path: Path
) -> None:
    plain = load("s3://bucket/")
    terms = (tmp_path / "f.yaml").read_text() + "privacy: {secure_aggregation: {}}\naggregation: {clip: {norm: 1.0}}\n"
    (tmp_path / "f.yaml").write_text(terms)
    secure = Federation.load(tmp_path / "f.yaml")
    sums = "rounds/00003/secagg"
    told = {s: {f"{sums}/1/{folder}/{s}.json" for folder in ("keys", "shares", "masked", "confirmations", "openings")} for s in SILOS}
    given = {f"{sums}/survivors.json", f"{sums}/1/rosters/share.json", f"{sums}/1/rosters/mask.json"}
    public = {key for s in SILOS for key in told[s] if "/openings/" not in key}
    every = given | set().union(*told.values())

    def may(policy: dict[str, Any], action: str) -> set[str]:
        patterns = [p for s in policy["Statement"] if s["Effect"] == "Allow" and s["Action"] == action for p in s["Resource"]]
        return {key for key in every if any(fits(p, arn("", key)) for p in patterns)}

    for silo in SILOS:
        policy = policies.silo_policy(secure, silo)
        assert may(policy, "s3:PutObject") == told[silo]
        assert may(policy, "s3:GetObject") == given | public | told[silo]
        assert may(policies.silo_policy(plain, silo), "s3:GetObject") == set()
    assert may(policies.coordinator_policy(secure), "s3:PutObject") == given
    assert may(policies.coordinator_policy(secure), "s3:GetObject") == every
    assert may(policies.coordinator_policy(secure), "s3:DeleteObject") == set()


def both(federation: Federation, **options: Any) -> list[dict[str, Any]]:
    return [policies.silo_policy(federation, "north", **options), policies.coordinator_policy(federation, **options)]


def test_nobody_reaches_beyond_the_federation(load: Callable[[str], Federation]) -> None:
    for policy in both(load("s3://bucket/team")):
        for statement in policy["Statement"]:
            names = [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
            prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", ())
            for pattern in (*names, *(f"arn:aws:s3:::bucket/{p}" for p in prefixes)):
                assert pattern == "arn:aws:s3:::bucket" or pattern.startswith(
                    ("arn:aws:s3:::bucket/team/tiny/", "arn:aws:s3:::bucket/team/.silotune-probe/")
                )


def test_every_write_must_carry_if_none_match_but_the_parts_of_an_upload(load: Callable[[str], Federation]) -> None:
    """In AWS's own form; a Deny, so that no other policy of the user lifts it. Neither moto nor Ceph knows these keys."""
    for policy in both(load("s3://bucket/team")):
        (deny,) = (s for s in policy["Statement"] if s["Effect"] == "Deny")
        assert deny["Action"] == "s3:PutObject"
        assert deny["Condition"] == {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}}
        (puts,) = (s for s in policy["Statement"] if s["Effect"] == "Allow" and s["Action"] == "s3:PutObject")
        assert all(any(fits(wide, put.replace("?", "x")) for wide in deny["Resource"]) for put in puts["Resource"])


def test_unencrypted_requests_are_refused_if_asked(load: Callable[[str], Federation]) -> None:
    federation = load("s3://bucket/team")
    for plain, strict in zip(both(federation), both(federation, tls_only=True), strict=True):
        assert strict["Statement"][:-1] == plain["Statement"]
        deny = strict["Statement"][-1]
        assert (deny["Effect"], deny["Action"], deny["Condition"]) == ("Deny", "s3:*", {"Bool": {"aws:SecureTransport": "false"}})


@pytest.fixture
def on_base(load: Callable[[str], Federation], tmp_path: Path) -> Callable[..., Federation]:
    def write(base: str, root: str = "s3://bucket/team") -> Federation:
        load(root)
        (tmp_path / "f.yaml").write_text((tmp_path / "f.yaml").read_text().replace("./base", base))
        return Federation.load(tmp_path / "f.yaml")

    return write


@pytest.mark.parametrize(
    ("base", "inside"), [("s3://models/llama/8b", "llama/8b/*"), ("s3://models/llama/8b/", "llama/8b/*"), ("s3://models", "*")]
)
def test_a_base_model_in_a_bucket_can_be_read_by_all_and_written_by_none(
    on_base: Callable[..., Federation], base: str, inside: str
) -> None:
    for policy in both(on_base(base)):
        about = [s for s in policy["Statement"] if "models" in str(s["Resource"])]
        assert [(s["Effect"], s["Action"]) for s in about] == [("Allow", "s3:GetObject"), ("Allow", "s3:ListBucket")]
        assert about[0]["Resource"] == [f"arn:aws:s3:::models/{inside}"]
        assert about[1]["Resource"] == "arn:aws:s3:::models"
        assert about[1]["Condition"] == {"StringLike": {"s3:prefix": [inside]}}


@pytest.mark.parametrize("base", ["s3://bucket", "s3://bucket/team", "s3://bucket/team/tiny", "s3://bucket/team/tiny/base"])
def test_a_base_model_that_shares_a_folder_with_the_store_is_refused(on_base: Callable[..., Federation], base: str) -> None:
    for use in (policies.render, policies.coordinator_policy, lambda f: policies.silo_policy(f, "north")):
        with pytest.raises(FederationError, match=r"model.base: must lie apart from the store, s3://bucket/team/tiny"):
            use(on_base(base))
    assert policies.render(on_base("s3://bucket/team/tiny-base"))


def test_a_key_of_the_bucket_can_be_used_by_all(load: Callable[[str], Federation]) -> None:
    key = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    federation = load("s3://bucket/team")
    for plain, with_key in zip(both(federation), both(federation, kms_key=key), strict=True):
        (added,) = (s for s in with_key["Statement"] if s not in plain["Statement"])
        assert added == {"Sid": "UseKey", "Effect": "Allow", "Action": ["kms:Decrypt", "kms:GenerateDataKey"], "Resource": key}
    for wrong in ("alias/silotune", "arn:aws:kms:eu-central-1:111122223333:alias/silotune", "*"):
        with pytest.raises(FederationError, match="--kms-key: must be a key's own"):
            policies.render(federation, kms_key=wrong)


def test_the_command_takes_both(load: Callable[[str], Federation]) -> None:
    federation = load("s3://bucket/team")
    key = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"
    told = CliRunner().invoke(app, ["policies", str(federation.file), "--tls-only", "--kms-key", key])
    assert told.stdout.strip() == policies.render(federation, tls_only=True, kms_key=key).strip()
    assert CliRunner().invoke(app, ["policies", str(federation.file)]).stdout.strip() == policies.render(federation).strip()


def test_policies_are_such_as_iam_takes(load: Callable[[str], Federation]) -> None:
    federation = load("s3://bucket/" + "p" * 100)
    key = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"
    for policy in both(federation, tls_only=True, kms_key=key):
        assert policy["Version"] == "2012-10-17"
        assert all(re.fullmatch(r"[A-Za-z0-9]+", s["Sid"]) for s in policy["Statement"])
        assert len({s["Sid"] for s in policy["Statement"]}) == len(policy["Statement"])
        assert len(re.sub(r"\s", "", json.dumps(policy))) <= 6144, "the most a managed policy may have"


def test_render_gives_each_party_a_heading_and_its_json(load: Callable[[str], Federation]) -> None:
    federation = load("s3://bucket/team")
    parts = re.split(r"^# (.*)\n", policies.render(federation), flags=re.MULTILINE)[1:]
    assert parts[::2] == [f"{party} of federation tiny" for party in ("the coordinator", "silo north", "silo plan", "silo south")]
    assert json.loads(parts[1]) == policies.coordinator_policy(federation)
    assert json.loads(parts[7]) == policies.silo_policy(federation, "south")


def test_a_folder_has_no_access_policies(load: Callable[[str], Federation], tmp_path: Path) -> None:
    federation = load(str(tmp_path / "store"))
    for use in (
        lambda: policies.render(federation),
        lambda: policies.silo_policy(federation, "north"),
        lambda: policies.coordinator_policy(federation),
    ):
        with pytest.raises(FederationError, match=r"storage.root: must be s3://bucket/prefix.*got '/.*/store'; a folder is guarded by"):
            use()
    with pytest.raises(FederationError, match="silo 'west' is not in federation 'tiny'"):
        policies.silo_policy(load("s3://bucket"), "west")


# --- against servers ---


def for_moto(policy: dict[str, Any]) -> dict[str, Any]:
    """As moto can take it: without its conditions, which allows more, never less."""
    kept = [{k: v for k, v in s.items() if k != "Condition"} for s in policy["Statement"] if s["Effect"] == "Allow"]
    return json.loads(json.dumps(policy | {"Statement": kept}).replace("?", "."))


class Parties:
    """Users of a server, each with its policy, and stores that speak as them."""

    def __init__(self, federation: Federation, endpoint: str, env: pytest.MonkeyPatch) -> None:
        self.federation, self.endpoint, self._env = federation, endpoint, env
        self.keys: dict[str, tuple[str, str]] = {}

    def policies(self) -> dict[str, dict[str, Any]]:
        federation = self.federation
        return {"coordinator": policies.coordinator_policy(federation)} | {s: policies.silo_policy(federation, s) for s in SILOS}

    def store(self, party: str) -> S3Store:
        self._env.setenv("AWS_ACCESS_KEY_ID", self.keys[party][0])
        self._env.setenv("AWS_SECRET_ACCESS_KEY", self.keys[party][1])
        store = S3Store(stores.BUCKET, self.federation.storage.root.split("/", 3)[3] + "/tiny")
        store.size(GIVEN[0])  # takes the credentials
        return store


@pytest.fixture(scope="module")
def strict_moto() -> Iterator[Any]:
    """A moto server of its own whose authorization can be switched on, with the bucket; gives a maker of clients."""
    server = subprocess.Popen([sys.executable, "-c", stores.SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    endpoint = f"http://{server.stdout.readline().strip()}"
    session = boto3.session.Session("AKIDEXAMPLE", "secret", region_name="us-east-1")
    yield lambda service: session.client(service, endpoint_url=endpoint)
    server.stdin.close()
    server.wait(timeout=20)


@pytest.fixture
def moto(aws: Callable[[str], None], strict_moto: Any, load: Callable[[str], Federation], monkeypatch: pytest.MonkeyPatch) -> Parties:
    s3, iam = strict_moto("s3"), strict_moto("iam")
    endpoint = s3.meta.endpoint_url
    authorization(endpoint, on=False)
    s3.create_bucket(Bucket=stores.BUCKET)
    aws(endpoint)
    mark = uuid.uuid4().hex[:8]
    parties = Parties(load(f"s3://{stores.BUCKET}/{mark}"), endpoint, monkeypatch)
    for party, policy in parties.policies().items():
        iam.create_user(UserName=f"{party}-{mark}")
        iam.put_user_policy(UserName=f"{party}-{mark}", PolicyName="silotune", PolicyDocument=json.dumps(for_moto(policy)))
        key = iam.create_access_key(UserName=f"{party}-{mark}")["AccessKey"]
        parties.keys[party] = key["AccessKeyId"], key["SecretAccessKey"]
    authorization(endpoint, on=True)
    return parties


def authorization(endpoint: str, on: bool) -> None:
    """From now on moto lets so many requests pass unasked."""
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0" if on else b"inf", {"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture
def ceph(aws: Callable[[str], None], gateway: Any, load: Callable[[str], Federation], monkeypatch: pytest.MonkeyPatch) -> Parties:
    aws(gateway.endpoint)
    mark = uuid.uuid4().hex[:8]
    parties = Parties(load(f"s3://{stores.BUCKET}/{mark}"), gateway.endpoint, monkeypatch)
    for party, policy in parties.policies().items():
        name = f"{party}-{mark}"
        gateway.admin("user", "create", f"--uid={name}", f"--display-name={name}", f"--access-key={name}", "--secret-key=of-a-test")
        gateway.client("iam").put_user_policy(UserName=name, PolicyName="silotune", PolicyDocument=json.dumps(policy))
        parties.keys[party] = name, "of-a-test"
    return parties


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def parties(request: pytest.FixtureRequest) -> Parties:
    return request.getfixturevalue(request.param)


@pytest.fixture
def filled(parties: Parties) -> Parties:
    """Every party has written all that it may."""
    coordinator = parties.store("coordinator")
    for key in sorted({*GIVEN, *PRIVATE, *of_silos(refusals)}):
        assert coordinator.create(key, b"of the coordinator")
    for silo in SILOS:
        store = parties.store(silo)
        for key in own(silo):
            assert store.create(key, silo.encode())
    return parties


def refused(*uses: Callable[[], object]) -> None:
    for use in uses:
        with pytest.raises(UnreachableError, match=r"refuses these credentials.*HTTP 403"):
            use()


@pytest.mark.parametrize("silo", SILOS)
def test_a_silo_can_take_part(filled: Parties, silo: str, tmp_path: Path) -> None:
    store = filled.store(silo)
    for key in (*GIVEN, *refusals(silo)):
        assert store.get(key) == b"of the coordinator"
    for key in own(silo):
        assert store.get(key) == silo.encode()
        assert store.create(key, b"again") is False
        assert store.get_range(key, 1, 2) == silo.encode()[1:3]
    for number, size in enumerate((5, PART + 1)):
        (tmp_path / "file").write_bytes(bytes(size))
        store.put_file(f"contributions/{silo}/{number:064d}", tmp_path / "file")
        store.fetch_file(f"contributions/{silo}/{number:064d}", tmp_path / "copy")
        assert (tmp_path / "copy").stat().st_size == size


def test_a_silo_tells_missing_from_forbidden(filled: Parties, tmp_path: Path) -> None:
    store = filled.store("north")
    missing = [key.replace("00003", "00004").replace(D, "f" * 64) for key in (*GIVEN, *own("north"), *refusals("north"))]
    for key in missing:
        assert store.size(key) is None
        for read in (store.get, lambda key: store.fetch_file(key, tmp_path / "copy"), lambda key: store.get_range(key, 0, 1)):
            with pytest.raises(ObjectMissing):
                read(key)


def test_a_silo_sees_nothing_of_others(filled: Parties, tmp_path: Path) -> None:
    store = filled.store("north")
    for key in sorted(EVERY - {PROBE, *GIVEN, *own("north"), *refusals("north")}):
        refused(
            lambda key=key: store.get(key),
            lambda key=key: store.get_range(key, 0, 1),
            lambda key=key: store.size(key),
            lambda key=key: store.fetch_file(key, tmp_path / "copy"),
        )


def test_a_silo_writes_and_deletes_nothing_else(filled: Parties, tmp_path: Path) -> None:
    store = filled.store("north")
    (tmp_path / "file").write_bytes(b"1")
    for key in sorted(EVERY - {PROBE, *own("north")}):
        later = key.replace("00003", "00004").replace(D, "f" * 64)
        refused(lambda key=key: store.create(key, b"1"), lambda later=later: store.create(later, b"1"), lambda key=key: store.delete(key))
    for key in own("north"):
        refused(lambda key=key: store.delete(key))
    (tmp_path / "big").write_bytes(bytes(PART))
    for path in (tmp_path / "file", tmp_path / "big"):
        refused(lambda path=path: store.put_file(f"contributions/south/{'f' * 64}", path))
    coordinator = filled.store("coordinator")
    assert sorted(coordinator.list("")) == sorted(EVERY - {PROBE}), "nothing came, nothing went"


def test_the_coordinator_runs_the_course(filled: Parties) -> None:
    coordinator = filled.store("coordinator")
    root = S3Store(stores.BUCKET, filled.federation.storage.root.split("/", 3)[3])
    root.check()
    assert list(root.list(".silotune-probe/")) == []
    for silo in SILOS:
        for key in own(silo):
            assert coordinator.get(key) == silo.encode()
    assert sorted(coordinator.list("rounds/00003/updates/")) == sorted(key for key in of_silos(own) if "/updates/" in key)
    coordinator.delete(f"contributions/north/{D}")
    assert coordinator.size(f"contributions/north/{D}") is None
    for key in sorted(EVERY - {PROBE}):
        if not key.startswith(("contributions/", "objects/")):
            refused(lambda key=key: coordinator.delete(key))
    for key in sorted(of_silos(own)):
        refused(lambda key=key: coordinator.create(key.replace("00003", "00004").replace(D, "f" * 64), b"1"))


@pytest.mark.ceph
def test_a_silo_lists_its_own_part_only(ceph: Parties) -> None:
    """moto ignores `s3:prefix`."""
    ceph.store("south").create(f"contributions/south/{D}", b"1")
    store = ceph.store("north")
    store.create(f"contributions/north/{D}", b"1")
    assert list(store.list("contributions/north/")) == [f"contributions/north/{D}"]
    assert list(store.list("rounds/00003/attempts/")) == []
    for prefix in ("", "rounds/", "rounds/00003/updates/", "contributions/", "contributions/south/", "evaluations/", "exports/", "audit/"):
        refused(lambda prefix=prefix: store.list(prefix))
    absent = f"contributions/south/{'f' * 64}"
    refused(lambda: store.size(absent), lambda: store.get(absent))
