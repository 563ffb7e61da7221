"""What a silo's admission policy lets in: the Job of the example, and none that differs from it where it matters."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from silotune.components.cluster import job_manifest, train_job
from silotune.components.federation import Federation
from silotune.components.terms.placement import Placement

sys.path.append(str(Path(__file__).parents[1] / "fakes"))
from kubernetes_api import jobset_job, schema_error

spec = importlib.util.spec_from_file_location("k8s_admission", Path(__file__).parent / "admission.py")
assert spec
assert spec.loader
admission = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(admission)

Object = dict[str, Any]
ROOT = Path(__file__).parents[2] / "k8s"
IMAGE = "registry.example/silotune-silo@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
POLICY = next(o for o in yaml.safe_load_all((ROOT / "base/silo/admission.yaml").read_text()) if o["kind"] == "ValidatingAdmissionPolicy")
TERMS = {
    "data": {
        "silo": "north", "maxSeconds": "10800", "image-1": IMAGE, "image-2": IMAGE.replace("9f", "00"), "runtimeClass": "silotune-gpu",
        "maxNodes": "4", "maxGpus": "8", "priorityClass-1": "research", "queue": "research", "claim-1": "silotune-models /models read-only",
    }
}  # fmt: skip
JOBSET = "system:serviceaccount:kubeflow-system:jobset-controller-manager"


def refused(job: Object, terms: Object = TERMS, user: str = admission.LAUNCHER) -> list[str]:
    return list(admission.refusals(POLICY, terms, job, user))


def main(job: Object) -> Object:
    return pod(job)["containers"][0]  # type: ignore[no-any-return]


def pod(job: Object) -> Object:
    return job["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def test_the_job_of_the_example_is_admitted(job: Object) -> None:
    assert refused(job) == []


def test_it_is_admitted_by_what_the_production_example_makes_of_the_policy(build: Any, job: Object) -> None:
    objects = build(ROOT / "overlays/example-production/silo-north")
    (policy,) = (o for o in objects if o["kind"] == "ValidatingAdmissionPolicy")
    (terms,) = (o for o in objects if o["metadata"]["name"] == "silotune-job-terms")
    assert admission.refusals(policy, terms, job) == []
    job["spec"]["activeDeadlineSeconds"] = 10801
    assert admission.refusals(policy, terms, job) == ["deadline"]


def test_what_the_api_server_fills_in_by_itself_is_admitted(job: Object) -> None:
    """A validating policy sees the Job with its defaults and its selector."""
    job["spec"] |= {"suspend": False, "completionMode": "NonIndexed", "podReplacementPolicy": "TerminatingOrFailed"}
    job["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": "0123"}}
    job["spec"]["template"]["metadata"] |= {"creationTimestamp": None}
    job["spec"]["template"]["metadata"]["labels"] |= {
        "batch.kubernetes.io/controller-uid": "0123", "batch.kubernetes.io/job-name": "j", "controller-uid": "0123", "job-name": "j"
    }  # fmt: skip
    pod(job).update(
        dnsPolicy="ClusterFirst", schedulerName="default-scheduler", serviceAccount="silotune-silo", terminationGracePeriodSeconds=30
    )
    main(job).update(terminationMessagePath="/dev/termination-log", terminationMessagePolicy="File", imagePullPolicy="IfNotPresent")
    pod(job)["volumes"][0]["configMap"]["defaultMode"] = 420
    assert refused(job) == []


@pytest.mark.parametrize("box", ["preprocess", "train", "evaluate"])
def test_every_box_is_admitted_and_a_gpu(job: Object, box: str) -> None:
    main(job)["args"] = [box, "/federation/federation.yaml", "north", *(["round:12 attempt:2"] if box != "preprocess" else [])]
    main(job)["image"] = TERMS["data"]["image-2"]
    pod(job)["runtimeClassName"] = "silotune-gpu"
    pod(job)["imagePullSecrets"] = [{"name": "silotune-registry"}]
    pod(job)["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    main(job)["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    main(job)["env"] += [
        {"name": "OMP_NUM_THREADS", "value": "8"},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
        {"name": "AWS_REGION", "valueFrom": {"configMapKeyRef": {"name": "silotune-store", "key": "AWS_REGION"}}},
    ]
    assert refused(job) == []


def together(job: Object, nodes: int = 2, gpus: int = 8) -> None:
    """Make it a training on several nodes."""
    job["spec"] |= {"completions": nodes, "parallelism": nodes, "completionMode": "Indexed"}
    pod(job)["subdomain"] = "silotune-nodes"
    master = f"{job['metadata']['name']}-0.silotune-nodes"
    main(job)["env"] += [
        {"name": n, "value": v} for n, v in (("PET_NNODES", str(nodes)), ("PET_NPROC_PER_NODE", str(gpus)), ("PET_MASTER_ADDR", master))
    ]
    for which in ("requests", "limits"):
        main(job)["resources"][which]["nvidia.com/gpu"] = str(gpus)


def test_a_training_on_several_nodes_and_gpus_is_admitted_where_the_terms_allow_it(job: Object) -> None:
    together(job)
    assert refused(job) == []
    one = {"data": {k: v for k, v in TERMS["data"].items() if not k.startswith("max") or k == "maxSeconds"}}
    assert refused(job, one) == ["env", "once", "resources"]  # one node and one GPU, where they say nothing


def test_the_network_settings_of_the_silo_are_admitted_and_its_own_authority(job: Object) -> None:
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
        main(job)["env"].append({"name": name, "valueFrom": {"configMapKeyRef": {"name": "silotune-store", "key": name, "optional": True}}})
    pod(job)["volumes"].append({"name": "ca", "configMap": {"name": "silotune-ca", "optional": True}})
    main(job)["volumeMounts"].append({"name": "ca", "mountPath": "/ca", "readOnly": True})
    main(job)["args"].append("until:1790000000")
    pod(job)["priorityClassName"] = "research"
    assert refused(job) == []


PLACEMENTS: list[Object] = [
    {}, {"nodes": 4, "gpus": 8, "cpu": "16", "memory": "128Gi", "runtime_class": "silotune-gpu", "priority_class": "research"}, {"gpus": 2},
]  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("box", "turn"), [("preprocess", ""), ("train", "round:3 attempt:1"), ("evaluate", "done:all 2 rounds are committed")]
)
def test_what_the_launcher_makes_is_admitted(federation: Any, placement: Object, box: str, turn: str) -> None:
    made = job_manifest.job_of(federation(**placement), "north", box, turn, 1_790_000_000)
    assert refused(made) == []


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    def load(**placement: Any) -> Federation:
        silo = {"id": "north", "train": "/silo/t.jsonl", "placement": {"namespace": "silotune-north", "image": IMAGE} | placement}
        terms = {"name": "trial", "model": {"base": "/silo/base"}, "rounds": {"deadline": "1h"}, "silos": [silo]}
        (tmp_path / "f.yaml").write_text(yaml.safe_dump(terms))
        return Federation.load(tmp_path / "f.yaml")

    return load


# TrainJobs

COMPONENT = ROOT / "components/trainjob"
TRAINJOBS = next(o for o in yaml.safe_load_all((COMPONENT / "admission.yaml").read_text()) if o["kind"] == "ValidatingAdmissionPolicy")
WITH_JOBSET = {"data": TERMS["data"] | {"jobsetController": JOBSET}}


@pytest.fixture
def trainjob(federation: Any) -> Object:
    made: Object = train_job.train_job_of(
        federation(trainer="trainjob", nodes=4, gpus=8), "north", "train", "round:3 attempt:1", 1_790_000_000
    )
    made["spec"] |= {"suspend": False, "managedBy": "trainer.kubeflow.org/trainjob-controller"}  # the server's defaults
    return made


def test_the_launchers_trainjob_is_admitted(trainjob: Object) -> None:
    assert admission.refusals(TRAINJOBS, WITH_JOBSET, trainjob) == []


def in_spec(**more: Any) -> Callable[[Object], object]:
    return lambda t: t["spec"].update(more)


def trainer(**more: Any) -> Callable[[Object], object]:
    return lambda t: t["spec"]["trainer"].update(more)


LARGE = {"memory": "4Gi", "nvidia.com/gpu": "9"}
TRAINJOB_REFUSED: list[tuple[str, Callable[[Object], object]]] = [
    ("fields", trainer(image="registry.example/other@sha256:" + "0" * 64)),
    ("fields", trainer(command=["sh", "-c", "env"])),
    ("fields", trainer(env=[{"name": "LD_PRELOAD", "value": "/silo/x.so"}])),
    ("fields", in_spec(initializer={"dataset": {"storageUri": "hf://x"}})),
    ("fields", in_spec(podSpecOverrides=[{"targetJobs": [{"name": "node"}]}])),  # 2.0
    ("fields", in_spec(podTemplateOverrides=[{"targetJobs": [{"name": "node"}]}])),  # 2.1
    ("fields", in_spec(runtimePatches=[{"manager": "x.example/y"}])),  # from 2.2 on
    ("fields", in_spec(annotations={"alpha.jobset.sigs.k8s.io/exclusive-topology": "zone"})),
    ("runtime", in_spec(runtimeRef={"name": "silotune", "kind": "ClusterTrainingRuntime", "apiGroup": "trainer.kubeflow.org"})),
    ("runtime", in_spec(runtimeRef={"name": "torch-distributed", "kind": "TrainingRuntime", "apiGroup": "trainer.kubeflow.org"})),
    ("runtime", in_spec(runtimeRef={"name": "silotune"})),
    ("managed-by", in_spec(managedBy="kueue.x-k8s.io/multikueue")),
    ("args", trainer(args=["preprocess", "/federation/federation.yaml", "north", "x"])),
    ("args", trainer(args=["train", "/silo/other.yaml", "north", "round:3 attempt:1"])),
    ("args", trainer(args=["train", "/federation/federation.yaml", "south", "round:3 attempt:1"])),
    ("args", trainer(args=["train", "/federation/federation.yaml", "north", "--help"])),
    ("args", trainer(args=["train", "/federation/federation.yaml", "north", "round:3 attempt:1", "until:never"])),
    ("nodes", trainer(numNodes=5)),
    ("nodes", trainer(numNodes=0)),
    ("nodes", trainer(numProcPerNode=9)),
    ("nodes", lambda t: t["spec"]["trainer"].pop("numNodes")),
    ("resources", lambda t: t["spec"]["trainer"].pop("resourcesPerNode")),
    ("resources", trainer(resourcesPerNode={"requests": LARGE, "limits": LARGE})),
    ("resources", trainer(resourcesPerNode={"requests": {"memory": "1Gi"}, "limits": {"memory": "1Gi"}, "claims": [{"name": "x"}]})),
    ("labels", lambda t: t["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "x"})),
    ("labels", lambda t: t["metadata"]["annotations"].update({"vault.hashicorp.com/agent-inject": "true"})),
    ("fields", lambda t: t["metadata"].update(finalizers=["example.com/never"])),
    ("resources", trainer(resourcesPerNode={w: {"memory": "1Gi", "smarter-devices/fuse": "1"} for w in ("requests", "limits")})),
]


@pytest.mark.parametrize(("rule", "change"), TRAINJOB_REFUSED, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(TRAINJOB_REFUSED)])
def test_a_trainjob_that_says_more_is_refused_by_its_rule_and_no_other(trainjob: Object, rule: str, change: Change) -> None:
    change(trainjob)
    assert admission.refusals(TRAINJOBS, WITH_JOBSET, trainjob) == [rule]


def test_every_rule_on_trainjobs_refuses_something() -> None:
    assert {rule for rule, _ in TRAINJOB_REFUSED} == {v["message"].split(":")[0] for v in TRAINJOBS["spec"]["validations"]}
    (rule,) = TRAINJOBS["spec"]["matchConstraints"]["resourceRules"]
    assert (rule["resources"], rule["operations"], "matchConditions" in TRAINJOBS["spec"]) == (["trainjobs"], ["CREATE"], False)


@pytest.fixture
def of_jobset(trainjob: Object, federation: Any) -> Object:
    """The Job that Kubeflow Trainer and JobSet make of the launcher's TrainJob and the silo's runtime."""
    placement = federation(trainer="trainjob", nodes=4, gpus=8).silo("north").placement
    return dict(jobset_job(trainjob, train_job.runtime_of(placement, "north", 10800)))


def test_what_jobset_makes_of_the_silos_runtime_is_admitted_from_its_controller_only(of_jobset: Object) -> None:
    assert refused(of_jobset, WITH_JOBSET, JOBSET) == []
    as_if = {"env", "host", "labels"}
    assert set(refused(of_jobset, WITH_JOBSET)) == as_if  # the launcher, with the same owner and the same marks
    assert set(refused(of_jobset, TERMS, JOBSET)) == as_if  # where the silo has no Kubeflow Trainer
    of_jobset["metadata"].pop("ownerReferences")
    assert set(refused(of_jobset, WITH_JOBSET, JOBSET)) == as_if


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("image", lambda job: main(job).update(image="registry.example/other@sha256:" + "0" * 64)),
        ("command", lambda job: main(job).update(command=["sh"])),
        ("env", lambda job: main(job)["env"].append({"name": "LD_PRELOAD", "value": "/silo/x.so"})),
        ("env", lambda job: main(job)["env"].append({"name": "PET_MASTER_ADDR", "value": "198.51.100.7"})),
        ("volumes", lambda job: pod(job)["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
        ("host", lambda job: main(job).update(ports=[{"containerPort": 29400, "hostPort": 29400}])),
        ("once", lambda job: job["spec"].update(parallelism=5, completions=5)),
        ("labels", lambda job: job["spec"]["template"]["metadata"]["annotations"].update({"vault.hashicorp.com/agent-inject": "true"})),
    ],
)
def test_the_jobs_of_jobset_are_held_to_the_same_rules(of_jobset: Object, rule: str, change: Change) -> None:
    change(of_jobset)
    assert rule in refused(of_jobset, WITH_JOBSET, JOBSET)


def test_the_runtime_that_is_reviewed_is_what_the_code_makes() -> None:
    written = yaml.safe_load((COMPONENT / "runtime.yaml").read_text())
    image = "registry.example/silotune-silo@sha256:" + "0" * 64
    assert written == train_job.runtime_of(Placement(namespace="silotune-silo", image=image), "silo", 86400)
    assert schema_error(written, "trainingruntime") == ""


Change = Callable[[Object], object]


def args(*words: str) -> Change:
    return lambda job: main(job).update(args=list(words))


def env(name: str, **how: Any) -> Change:
    return lambda job: main(job)["env"].append({"name": name, **how})


def secret(name: str, key: str) -> Object:
    return {"secretKeyRef": {"name": name, "key": key}}


def volume(name: str, **source: Any) -> Change:
    return lambda job: pod(job)["volumes"].append({"name": name, **source})


def mount(**what: Any) -> Change:
    return lambda job: main(job)["volumeMounts"].append(what)


def job_spec(**more: Any) -> Change:
    return lambda job: job["spec"].update(more)


def job_without(name: str) -> Change:
    return lambda job: job["spec"].pop(name)


def in_pod(**more: Any) -> Change:
    return lambda job: pod(job).update(more)


def in_main(**more: Any) -> Change:
    return lambda job: main(job).update(more)


def pod_context(**more: Any) -> Change:
    return lambda job: pod(job)["securityContext"].update(more)


def main_context(**more: Any) -> Change:
    return lambda job: main(job)["securityContext"].update(more)


def template(**more: Any) -> Change:
    return lambda job: job["spec"]["template"]["metadata"].update(more)


def change_volume(name: str, kind: str, **more: Any) -> Change:
    return lambda job: next(v for v in pod(job)["volumes"] if v["name"] == name)[kind].update(more)


def without_env(name: str) -> Change:
    return lambda job: main(job).update(env=[e for e in main(job)["env"] if e["name"] != name])


def devices(name: str) -> Change:
    return lambda job: [main(job)["resources"][which].update({name: "1"}) for which in ("requests", "limits")]


FILE = "/federation/federation.yaml"
MODELS = {"persistentVolumeClaim": {"claimName": "silotune-models", "readOnly": True}}
OWN = ("AWS_ENDPOINT_URL", "AWS_REGION", "SILO_AWS_ACCESS_KEY_ID", "SILO_AWS_SECRET_ACCESS_KEY", "SILO_AWS_ENDPOINT_URL", "SILO_AWS_REGION")
REFUSED: list[tuple[str, Change]] = [
    ("args", args("train", FILE, "north", "round:1 attempt:1", "until:soon")),
    ("args", args("train", FILE, "north", "until:99999999999999")),
    ("env", env("PET_NPROC_PER_NODE", value="9")),
    ("env", env("PET_NPROC_PER_NODE", value="auto")),
    ("env", env("PET_NNODES", value="2")),  # of a Job that has one
    ("env", env("PET_MASTER_ADDR", value="198.51.100.7")),
    ("env", env("PET_MASTER_ADDR", value="another-job-0.silotune-nodes")),
    ("env", env("PET_MASTER_PORT", value="29400")),
    ("env", env("PET_RDZV_CONF", value="timeout=1")),
    ("env", env("HTTPS_PROXY", valueFrom={"configMapKeyRef": {"name": "another", "key": "HTTPS_PROXY"}})),
    ("env", env("SSL_CERT_FILE", value="/tmp/ca.pem")),
    ("env", env("AWS_CA_BUNDLE", valueFrom={"configMapKeyRef": {"name": "silotune-store", "key": "AWS_REGION"}})),
    ("volumes", volume("ca", configMap={"name": "another"})),
    ("mounts", mount(name="ca", mountPath="/ca")),
    ("mounts", mount(name="ca", mountPath="/etc/ssl/certs", readOnly=True)),
    ("host", in_pod(subdomain="elsewhere")),
    ("host", in_pod(hostname="store")),
    ("once", lambda job: together(job, nodes=5)),
    ("once", lambda job: (together(job), job["spec"].pop("completionMode"))),
    ("once", lambda job: (together(job), job["spec"].update(completions=3))),
    ("once", lambda job: (together(job), main(job)["args"].__setitem__(0, "evaluate"))),
    ("once", job_spec(backoffLimitPerIndex=1)),
    ("resources", in_main(resources={"requests": {"memory": "1Gi"}, "limits": {"memory": "1Gi", "nvidia.com/gpu": "9"}})),
    ("placement", in_pod(priorityClassName="urgent")),
    ("one-container", lambda job: pod(job)["containers"].append({"name": "sidecar", "image": IMAGE})),
    ("one-container", in_pod(initContainers=[{"name": "first", "image": IMAGE}])),
    ("one-container", in_pod(ephemeralContainers=[{"name": "shell", "image": IMAGE}])),
    ("image", in_main(image="registry.example/silotune-silo:1.0")),
    ("image", in_main(image="registry.example/other@sha256:" + "9" * 64)),
    ("image", in_main(image=f"{IMAGE}\n")),
    ("image", in_main(image="north")),  # a value of the terms, but no image
    ("command", in_main(command=["sh", "-c", "tar c /silo"])),
    ("command", lambda job: main(job).pop("command")),
    ("command", in_main(command=["python", "-m", "silotune.components.silo_job", "-c"])),
    ("command", in_main(workingDir="/silo")),
    ("args", args("export", FILE, "north")),
    ("args", args("train", "/silo/other.yaml", "north")),
    ("args", args("train", FILE, "south")),
    ("args", args("train", FILE)),
    ("args", args("train", FILE, "north", "--option")),
    ("args", args("train", FILE, "north", "$(AWS_SECRET_ACCESS_KEY)")),
    ("args", args("train", FILE, "north", "a/b")),
    ("args", args("train", FILE, "north", "1", "2", "3", "4", "5")),
    ("args", lambda job: main(job).pop("args")),
    ("env", env("PYTHONPATH", value="/silo")),
    ("env", env("LD_PRELOAD", value="/silo/x.so")),
    ("env", env("HTTPS_PROXY", value="http://192.0.2.1")),
    ("env", env("HOME", value="/silo")),
    ("env", env("OMP_NUM_THREADS", value="many")),
    ("env", env("AWS_ENDPOINT_URL", value="https://elsewhere.example")),
    ("env", env("AWS_ACCESS_KEY_ID", value="ours")),
    ("env", env("AWS_SECRET_ACCESS_KEY", valueFrom=secret("silotune-keys", "AWS_SECRET_ACCESS_KEY"))),
    ("env", env("AWS_SECRET_ACCESS_KEY", valueFrom=secret("silotune-s3", "AWS_ACCESS_KEY_ID"))),
    ("env", in_main(envFrom=[{"secretRef": {"name": "silotune-s3"}}])),
    ("volumes", volume("host", hostPath={"path": "/"})),
    ("volumes", volume("silo", hostPath={"path": "/"})),
    ("volumes", volume("silo", persistentVolumeClaim={"claimName": "hospital-archive"})),
    ("volumes", volume("keys", secret={"secretName": "other"})),
    ("volumes", volume("federation", configMap={"name": "of-the-coordinator"})),
    ("volumes", volume("token", projected={"sources": [{"serviceAccountToken": {"path": "token"}}]})),
    ("volumes", volume("scratch", nfs={"server": "192.0.2.1", "path": "/"})),
    ("mounts", mount(name="silo", mountPath="/usr/lib/python3")),
    ("mounts", mount(name="keys", mountPath="/keys")),
    ("mounts", mount(name="silo", mountPath="/silo", subPath="north")),
    ("mounts", in_main(volumeDevices=[{"name": "silo", "devicePath": "/dev/x"}])),
    ("host", in_pod(hostNetwork=True)),
    ("host", in_pod(hostPID=True)),
    ("host", in_pod(hostIPC=True)),
    ("host", in_pod(shareProcessNamespace=True)),
    ("host", in_pod(hostAliases=[{"ip": "192.0.2.1", "hostnames": ["store.example"]}])),
    ("host", in_pod(nodeName="node-1")),
    ("host", in_main(ports=[{"containerPort": 1, "hostPort": 1}])),
    ("account", in_pod(serviceAccountName="default")),
    ("account", lambda job: pod(job).pop("serviceAccountName")),
    ("account", in_pod(automountServiceAccountToken=True)),
    ("account", lambda job: pod(job).pop("automountServiceAccountToken")),
    ("deadline", job_without("activeDeadlineSeconds")),
    ("deadline", job_spec(activeDeadlineSeconds=10801)),
    ("ttl", job_without("ttlSecondsAfterFinished")),
    ("ttl", job_spec(ttlSecondsAfterFinished=604801)),
    ("once", job_spec(parallelism=2)),
    ("once", job_spec(completions=2)),
    ("once", job_spec(backoffLimit=6)),
    ("once", job_without("backoffLimit")),
    ("once", in_pod(restartPolicy="OnFailure")),
    ("pod-security", lambda job: pod(job).pop("securityContext")),
    ("pod-security", pod_context(runAsUser=0)),
    ("pod-security", pod_context(runAsNonRoot=False)),
    ("pod-security", pod_context(seccompProfile={"type": "Unconfined"})),
    ("container-security", main_context(privileged=True)),
    ("container-security", main_context(allowPrivilegeEscalation=True)),
    ("container-security", main_context(readOnlyRootFilesystem=False)),
    ("container-security", main_context(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]})),
    ("container-security", main_context(capabilities={"drop": ["NET_RAW"]})),
    ("container-security", main_context(runAsUser=0)),
    ("container-security", lambda job: main(job).pop("securityContext")),
    ("no-hooks", in_main(lifecycle={"postStart": {"exec": {"command": ["sh"]}}})),
    ("no-hooks", in_main(livenessProbe={"exec": {"command": ["sh"]}})),
    ("no-hooks", in_main(startupProbe={"exec": {"command": ["sh"]}})),
    ("no-hooks", in_main(stdin=True)),
    ("messages", in_main(terminationMessagePolicy="FallbackToLogsOnError")),
    ("resources", lambda job: main(job).pop("resources")),
    ("resources", in_main(resources={"requests": {"memory": "1Gi"}, "limits": {"cpu": "1"}})),
    ("placement", in_pod(runtimeClassName="privileged")),
    ("placement", in_pod(schedulerName="other")),
    ("placement", in_pod(priorityClassName="system-cluster-critical")),
    ("placement", in_pod(dnsPolicy="None", dnsConfig={"nameservers": ["192.0.2.1"]})),
    ("placement", in_pod(resourceClaims=[{"name": "x"}])),
    ("placement", in_pod(imagePullSecrets=[{"name": "silotune-keys"}])),
    # A Job that cannot be deleted goes on whatever the silo does.
    ("fields", lambda job: job["metadata"].update(finalizers=["example.com/never"])),
    ("fields", template(finalizers=["example.com/never"])),
    ("fields", in_pod(terminationGracePeriodSeconds=31_536_000)),
    # A selector takes over pods that are nobody's, such as those of the silo's own people.
    ("fields", job_spec(manualSelector=True, selector={"matchLabels": {"app.kubernetes.io/name": "silotune"}})),
    ("fields", job_spec(managedBy="kueue.x-k8s.io/multikueue")),  # would be sent to another cluster
    ("fields", job_spec(successPolicy={"rules": [{"succeededIndexes": "0"}]})),
    ("fields", in_pod(activeDeadlineSeconds=1)),
    ("fields", in_pod(resources={"limits": {"memory": "64Gi"}})),
    ("fields", in_pod(hostUsers=True)),
    ("fields", in_pod(topologySpreadConstraints=[{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}])),
    ("fields", in_main(restartPolicyRules=[{"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [0]}}])),
    # The silo's policy lies beside its terms: a volume that leaves it out, or a file over it, would be a silo without one.
    ("volumes", change_volume("federation", "configMap", items=[{"key": "federation.yaml", "path": "federation.yaml"}])),
    ("volumes", change_volume("federation", "configMap", optional=True)),
    ("volumes", change_volume("keys", "secret", items=[{"key": "south.pem", "path": "north.pem"}])),
    ("volumes", volume("models", persistentVolumeClaim={"claimName": "hospital-archive"})),
    ("messages", in_main(terminationMessagePath="/federation/policy.yaml")),
    ("messages", in_main(terminationMessagePath="/silo/north/ledger/north/000001.json")),
    ("mounts", mount(name="silo", mountPath="/silo", mountPropagation="HostToContainer")),
    ("mounts", lambda job: (volume("models", **MODELS)(job), mount(name="models", mountPath="/models")(job))),  # to be read only
    ("mounts", lambda job: (volume("models", **MODELS)(job), mount(name="models", mountPath="/keys", readOnly=True)(job))),
    # Without its own addresses, a silo's records and ledger would be looked for where the coordinator writes.
    *[("env", without_env(name)) for name in OWN],
    ("env", env("SILO_AWS_ENDPOINT_URL", value="https://elsewhere.example")),
    ("env", env("SILO_AWS_ACCESS_KEY_ID", valueFrom=secret("silotune-s3", "AWS_ACCESS_KEY_ID"))),
    ("env", env("SILO_AWS_ACCESS_KEY_ID", valueFrom=secret("silotune-own-s3", "AWS_SECRET_ACCESS_KEY"))),
    ("env", env("NODE", valueFrom={"fieldRef": {"fieldPath": "spec.nodeName"}})),
    ("env", env("OMP_NUM_THREADS", valueFrom={"resourceFieldRef": {"resource": "limits.cpu"}})),
    ("env", env("PET_NODE_RANK", valueFrom={"fieldRef": {"fieldPath": "metadata.name"}})),
    ("once", job_spec(podFailurePolicy={"rules": [{"action": "Ignore", "onExitCodes": {"operator": "NotIn", "values": [0]}}]})),
    ("once", job_spec(podFailurePolicy={"rules": [{"action": "Count", "onPodConditions": [{"type": "Ready", "status": "False"}]}]})),
    ("once", job_spec(parallelism=0)),
    ("pod-security", pod_context(runAsUser=10000)),  # what it leaves in the volume no later Job could read
    ("pod-security", pod_context(runAsGroup=0)),
    ("pod-security", pod_context(fsGroup=2000)),
    ("pod-security", pod_context(supplementalGroups=[0])),
    ("pod-security", pod_context(seLinuxOptions={"level": "s0:c1,c2"})),
    ("pod-security", pod_context(sysctls=[{"name": "net.ipv4.ping_group_range", "value": "0 2147483647"}])),
    ("container-security", main_context(seLinuxOptions={"level": "s0:c1,c2"})),
    ("container-security", main_context(procMount="Unmasked")),
    ("container-security", main_context(seccompProfile={"type": "RuntimeDefault"})),
    ("resources", devices("smarter-devices/fuse")),
    ("resources", devices("devices.kubevirt.io/kvm")),
    # Whoever has root on a node can read what its pods read.
    ("nodes", in_pod(nodeSelector={"kubernetes.io/hostname": "of-the-coordinator"})),
    ("nodes", in_pod(tolerations=[{"operator": "Exists"}])),
    ("nodes", in_pod(tolerations=[{"key": "of-the-coordinator", "operator": "Exists"}])),
    ("nodes", in_pod(affinity={"nodeAffinity": {}})),
    ("labels", lambda job: job["metadata"].update(annotations={"example.com/inject": "true"})),
    ("labels", lambda job: job["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "another"})),
    ("labels", lambda job: job["metadata"]["labels"].update({"example.com/inject": "true"})),
    ("labels", template(annotations={"vault.hashicorp.com/agent-inject": "true"})),
    ("labels", template(labels={"azure.workload.identity/use": "true"})),
]


@pytest.mark.parametrize(("rule", "change"), REFUSED, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(REFUSED)])
def test_a_job_that_differs_is_refused_by_its_rule_and_no_other(job: Object, rule: str, change: Change) -> None:
    change(job)
    assert refused(job) == [rule]


def test_every_rule_refuses_something() -> None:
    assert {rule for rule, _ in REFUSED} == {v["message"].split(":")[0] for v in POLICY["spec"]["validations"]}


@pytest.mark.parametrize(
    ("terms", "rules"),
    [
        ({}, {"image", "args", "deadline", "nodes"}),
        ({"data": {"silo": "north", "maxSeconds": "10800"}}, {"image"}),
        ({"data": {"silo": "north", "maxSeconds": "soon", "image-1": IMAGE}}, {"deadline"}),
    ],
)
def test_terms_that_are_missing_admit_nothing(job: Object, terms: Object, rules: set[str]) -> None:
    assert set(refused(job, terms)) == rules


def test_a_runtime_class_is_refused_where_the_terms_name_none(job: Object) -> None:
    pod(job)["runtimeClassName"] = "silotune-gpu"
    assert refused(job, {"data": {k: v for k, v in TERMS["data"].items() if k != "runtimeClass"}}) == ["placement"]


PINNED = {
    "data": TERMS["data"] | {"node-1": "pool=silo", "node-2": "zone=a", "toleration-1": "gpu", "affinity": "any", "gpuType": "amd.com/gpu"}
}


def on_nodes(job: Object) -> None:
    pod(job).update(
        nodeSelector={"pool": "silo", "zone": "a"}, tolerations=[{"key": "gpu", "operator": "Exists"}], affinity={"nodeAffinity": {}}
    )


def test_jobs_run_on_the_nodes_that_the_silo_names_and_on_no_others(job: Object) -> None:
    assert refused(job, PINNED) == ["nodes"]  # none is named
    on_nodes(job)
    assert refused(job, PINNED) == []
    for wrong in ({"pool": "silo"}, {"pool": "silo", "zone": "b"}, {"pool": "silo", "zone": "a", "host": "x"}):
        pod(job)["nodeSelector"] = wrong
        assert refused(job, PINNED) == ["nodes"]


def test_devices_are_of_the_kind_that_the_silo_names(job: Object) -> None:
    on_nodes(job)
    devices("amd.com/gpu")(job)
    assert refused(job, PINNED) == []
    devices("nvidia.com/gpu")(job)
    assert refused(job, PINNED) == ["resources"]


def test_another_claim_is_mounted_where_the_silo_says_and_a_queue_may_be_named(job: Object) -> None:
    volume("models", **MODELS)(job)
    mount(name="models", mountPath="/models", readOnly=True)(job)
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    assert refused(job) == []
    bare = {"data": {k: v for k, v in TERMS["data"].items() if k not in ("claim-1", "queue")}}
    assert refused(job, bare) == ["volumes", "mounts", "labels"]


def test_only_jobs_are_asked_about_and_only_when_created() -> None:
    (rule,) = POLICY["spec"]["matchConstraints"]["resourceRules"]
    assert rule == {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    assert "matchConditions" not in POLICY["spec"], "whoever creates a Job"
