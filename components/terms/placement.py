"""Placement, as terms: what a silo's work, and the coordinator's own boxes, need from a Kubernetes cluster. Free to change at any time."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from silotune.components.federation_file import HTTP_URL, KUBERNETES_NAME, QUANTITY
from silotune.components.terms.section import Positive, Section

KubernetesName = Annotated[str, Field(pattern=KUBERNETES_NAME)]


class Toleration(Section):
    """A taint of nodes that the silo's pods may run on."""

    key: str | None = Field(None, description="Taint key; default: every taint.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="`Equal` compares `value`.")
    value: str | None = Field(None, description="With `Equal`.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="Default: every effect.")


class SecretUse(Section):
    """A Kubernetes Secret that the silo's work needs, in the namespace where it runs."""

    name: KubernetesName = Field(description="Name of the Secret.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment variable -> key of the Secret.")
    mount: str | None = Field(None, pattern=r"^/", description="Folder that the Secret's keys appear in as files.")


class Claim(Section):
    """A PersistentVolumeClaim and where it appears."""

    claim: KubernetesName = Field(description="Name of the claim.")
    mount: str = Field(pattern=r"^/", description="Folder that it appears as.")
    read_only: bool = Field(False, description="Mounted for reading only.")


class Placement(Section):
    """What a silo's work needs from the cluster. Constants when the pipeline is compiled."""

    namespace: KubernetesName | None = Field(None, description="Where the silo's Jobs run; with `launcher: job`, the silo's own.")
    kubeconfig_secret: KubernetesName | None = Field(
        None, description="Secret with a `kubeconfig` for the silo's own cluster; default: the cluster of the pipeline."
    )
    image: str | None = Field(None, description="Image of the silo's work, by digest: `registry/silotune-silo@sha256:…`.")
    service_account: KubernetesName | None = Field(None, description="Account that the silo's pods run as.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes it may run on.")
    tolerations: list[Toleration] = Field(default_factory=list, description="Taints it puts up with.")
    affinity: dict[str, Any] = Field(default_factory=dict, description="A Kubernetes affinity, as in a pod.")
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs per pod; training uses all of them, the other boxes one.")
    gpu_type: str = Field("nvidia.com/gpu", description="Resource name of the GPUs.")
    cpu: str | None = Field(None, pattern=QUANTITY, description="CPUs, such as `4` or `500m`.")
    memory: str | None = Field(None, pattern=QUANTITY, description="Memory, such as `16Gi`; also the limit.")
    ephemeral_storage: str | None = Field(None, pattern=QUANTITY, description="Local disk, such as `20Gi`; also the limit.")
    runtime_class: KubernetesName | None = Field(None, description="Runtime class, such as `nvidia` or a confidential one.")
    priority_class: KubernetesName | None = Field(None, description="Priority class.")
    claims: list[Claim] = Field(default_factory=list, description="Volumes: the silo's storage, its records, a cache of models.")
    secrets: list[SecretUse] = Field(default_factory=list, description="Secrets, as files or as environment variables.")
    config_map: KubernetesName | None = Field(None, description="ConfigMap whose key `federation.yaml` is the silo's copy of this file.")
    trainer: Literal["job", "trainjob"] = Field("job", description="Training as a Job, or as a TrainJob of Kubeflow Trainer.")
    nodes: Positive = Field(1, description="Pods that train together, in a storage that all of them can write.")


class Coordinator(Section):
    """What initialize, aggregate and export need from the cluster of the pipeline. Launchers, too, use its nodes and names."""

    cpu: str = Field("1", pattern=QUANTITY, description="CPUs of a box, such as `4` or `500m`; also the limit.")
    memory: str = Field(
        "4Gi",
        pattern=QUANTITY,
        description="Memory of a box, such as `16Gi`; also the limit. initialize and export hold the base model, aggregate one tensor at a time.",
    )
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes it may run on.")
    tolerations: list[Toleration] = Field(default_factory=list, description="Taints it puts up with.")
    claims: list[Claim] = Field(
        default_factory=list, description="Volumes for initialize and export, such as one that holds `model.base` where it is a folder."
    )
    config_map: KubernetesName = Field(
        "silotune-federation", description="ConfigMap whose key `federation.yaml` is the coordinator's copy of this file."
    )
    keys_secret: KubernetesName = Field(
        "silotune-keys",
        description="Secret with `coordinator.pem`, the signing key, and with `privacy.silo` `coordinator.noise`; no launcher gets it.",
    )
    s3_secret: KubernetesName = Field("silotune-s3", description="Secret with `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.")
    mlflow_secret: KubernetesName = Field(
        "silotune-mlflow", description="Secret with `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, where the server asks."
    )

    kfp_api: str = Field(
        "http://ml-pipeline.kubeflow.svc.cluster.local:8888",
        pattern=HTTP_URL,
        description="Kubeflow's API as pods reach it: the last run disables its schedule there.",
    )

    @model_validator(mode="after")
    def _claims_for_writing(self) -> Coordinator:
        if mounted := [c.claim for c in self.claims if c.read_only]:
            raise ValueError(f"claims must not be read_only, which KFP 2.17 cannot do; leave it out for {', '.join(mounted)}")
        return self
