"""What must hold once a federation has run: by the store, by the silos' Jobs and pods, and by what Kubeflow keeps."""

from __future__ import annotations

import json
from typing import Any

from silotune.components.cluster import job_manifest
from silotune.components.federation import Federation
from trial.trial import Trial

Object = dict[str, Any]
LONG = 20  # characters of a private key's line that cannot stand in a text by accident


def course_is_whole(trial: Trial, federation: Federation, rounds: int) -> Object:
    """Every round is committed, with every silo, and a model is put out; returns what `silotune status --json` prints."""
    course = trial.course(federation)
    assert [r["round"] for r in course["rounds"]] == list(range(rounds + 1)), course
    assert all(r["committed"] for r in course["rounds"]), course
    for r in course["rounds"][1:]:
        assert (r["participants"], r["missing"]) == (sorted(trial.place.silos), {}), r
        assert r["bytes"]["up"] > 0, r
    assert all(r["global"]["loss"] is not None for r in course["rounds"]), course
    assert course["export"], course
    return course


def jobs_are_complete(trial: Trial, federation: Federation, rounds: int) -> None:
    """One Job for each box of each silo in each round, made once and complete."""
    expected = sorted([("preprocess", "0", "0"), *(("train", str(r), "1") for r in range(1, rounds + 1)), ("evaluate", "", "")])
    for silo in trial.place.silos:
        found = trial.kube.jobs(silo, federation=federation.name)
        marks = [tuple(j.metadata.labels[f"silotune.dev/{key}"] for key in ("box", "round", "attempt")) for j in found]
        assert sorted(m if m[0] != "evaluate" else ("evaluate", "", "") for m in marks) == expected, silo
        for job in found:
            assert condition(job)[0] == "Complete", (job.metadata.name, condition(job))


def condition(job: Any) -> tuple[str, str, str]:
    """(Complete or Failed, reason, message) of a Job; empty words while it goes on."""
    for c in job.status.conditions or []:
        if c.type in ("Complete", "Failed") and c.status == "True":
            return c.type, c.reason or "", c.message or ""
    return "", "", ""


def pods_are_confined(trial: Trial, federation: Federation) -> None:
    """The pods that have seen records ran as the silo's policy pins it: image, words, user, capabilities, volumes, no token."""
    for silo in trial.place.silos:
        seen = 0
        for job in trial.kube.jobs(silo, federation=federation.name):
            box = job.metadata.labels["silotune.dev/box"]
            wanted = job_manifest.job_of(federation, silo, box)["spec"]["template"]["spec"]
            for pod in trial.kube.pods_of(job):
                spec = trial.kube.api.sanitize_for_serialization(pod.spec)
                seen += 1
                assert spec["securityContext"] == wanted["securityContext"], pod.metadata.name
                assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == (job_manifest.ACCOUNT, False)
                assert sorted(v["name"] for v in spec["volumes"]) == sorted(v["name"] for v in wanted["volumes"])
                (container,), (pinned,) = spec["containers"], wanted["containers"]
                for key in ("image", "command", "securityContext"):
                    assert container[key] == pinned[key], (pod.metadata.name, key)
                assert not spec.get("hostNetwork")
        assert seen, f"no pod of {silo} is left to look at"


def nothing_secret_is_kept(trial: Trial, run: str) -> None:
    """Neither the run, nor its pipeline, nor the pods of its tasks hold a secret, or name one of a silo."""
    shown = trial.run_object(run)
    pinned = shown.pipeline_version_reference
    client = trial.cluster.client
    version = client.get_pipeline_version(pinned.pipeline_id, pinned.pipeline_version_id)
    pods = trial.kube.pods(trial.place.tasks, f"pipeline/runid={run}")
    text = json.dumps([shown.to_dict(), version.to_dict(), [trial.kube.api.sanitize_for_serialization(p) for p in pods]], default=str)
    assert trial.place.silos[0] in text, "the texts are not those of this federation"
    for party, (_, secret) in trial.credentials.items():
        assert secret not in text, f"the credentials of {party} stand in what Kubeflow keeps"
    for file in (trial.folder / "keys").glob("*.pem"):
        lines = [line for line in file.read_text().splitlines() if len(line) > LONG and "-----" not in line]
        assert lines
        assert not [line for line in lines if line in text], f"{file.name} stands in what Kubeflow keeps"
    for name in ("silotune-keys", "silotune-s3"):  # the silos'; the coordinator's have the trial's name in them
        assert f'"{name}"' not in text, f"a silo's Secret {name} is named in what Kubeflow keeps"


def artefacts(trial: Trial, run: str) -> dict[str, list[str]]:
    """Names of the aggregate boxes' artefacts -> texts that Kubeflow's own store holds, as far as it can be looked into.

    Kubeflow's API lists outputs of tasks in some releases only, so its store is read: that of the standalone manifests.
    """
    import boto3
    from botocore.config import Config

    found: dict[str, list[str]] = {}
    details = trial.run_object(run).run_details
    for task in (details.task_details if details else None) or []:
        for name in task.outputs or {}:
            found.setdefault(name, [])
    if (way := trial.kube.kubeflows_store()) is None:
        return found
    forward, access, key = way
    s3 = boto3.client("s3", endpoint_url=trial.keep(forward).url, aws_access_key_id=access, aws_secret_access_key=key, region_name="us-east-1",
                      config=Config(s3={"addressing_style": "path"}))  # fmt: skip
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="mlpipeline"):
        for item in page.get("Contents", []):
            name = item["Key"].rpartition("/")[2]
            if run in item["Key"] and name in ("page", "metrics"):
                found.setdefault(name, []).append(s3.get_object(Bucket="mlpipeline", Key=item["Key"])["Body"].read().decode())
    return found


def in_mlflow(trial: Trial, federation: Federation, rounds: int, address: str) -> None:
    """One run of MLflow for the federation, with a step per round."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name(federation.name)
    assert experiment, f"MLflow has no experiment {federation.name}"
    (kept,) = client.search_runs([experiment.experiment_id])
    steps = {m.step for m in client.get_metric_history(kept.info.run_id, "global/loss")}
    assert steps == set(range(rounds + 1))
