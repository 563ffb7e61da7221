"""The trial on a real cluster that the tests marked `cluster` share; made once, and taken away at the end, on Ctrl-C and SIGTERM as well.

    make test-cluster

See docs/kubernetes.md, "A trial on kind", for a cluster from nothing, and `trial.place` for the environment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from trial import place
from trial.kube import Kube, require_kubectl
from trial.trial import Trial


@pytest.fixture(scope="session")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    if why := place.missing(os.environ) or require_kubectl():
        pytest.skip(why)
    from silotune.pipelines.kubeflow.kfp_api import connect

    here = place.of(os.environ)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    try:
        with Trial(here, Kube(here), connect(), tmp_path_factory.mktemp("trial")) as made:
            yield made
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that failed on the cluster shows how the cluster stood."""
    outcome: Any = yield
    report, made = outcome.get_result(), getattr(item, "funcargs", {}).get("trial")
    if report.failed and isinstance(made, Trial):
        report.sections.append(("the cluster", made.picture()))
