"""A Kubernetes API that is only looked at: by the doctor, with whatever rights the account that asks has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from silotune.components.errors import UnreachableError

METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"  # of a Secret, all but its data
TIMEOUT = (5, 20)  # seconds to connect, and for an answer


class NoRight(Exception):
    """This account may not look."""


@dataclass(frozen=True)
class Kubernetes:
    """A Kubernetes API, to be looked at only."""

    client: Any

    def get(self, path: str, *, accept: str = "application/json") -> dict[str, Any] | None:
        """The object; None if there is none.

        Raises:
            NoRight: not for this account.
            UnreachableError: no answer.
        """
        import urllib3.exceptions
        from kubernetes.client import ApiException

        try:
            answer = self.client.call_api(path, "GET", header_params={"Accept": accept}, auth_settings=["BearerToken"], response_type="object",
                                          _return_http_data_only=True, _request_timeout=TIMEOUT)  # fmt: skip
            return dict(answer)
        except ApiException as error:
            if error.status == 404:
                return None
            if error.status in (401, 403):
                raise NoRight from None
            raise UnreachableError(f"the Kubernetes API cannot serve ({error.status}); wait and try again", "cluster unreachable") from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnreachableError(f"the Kubernetes API gives no answer ({type(error).__name__}); check the kubeconfig") from None


def reach() -> Kubernetes:
    """The API of the cluster that this pod runs in, else of the kubeconfig's. Raises UnreachableError where none is known."""
    from kubernetes import client, config
    from kubernetes.config import ConfigException

    settings = client.Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(settings)
        else:
            config.load_kube_config(client_configuration=settings, persist_config=False)
    except ConfigException as error:
        raise UnreachableError(f"no Kubernetes API is known ({error}); set KUBECONFIG, or run this in a pod") from None
    settings.retries = 1
    return Kubernetes(client.ApiClient(settings))
