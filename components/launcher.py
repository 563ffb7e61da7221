"""Where a silo's work is done: in this task's own machine, or by a Job in the silo's cluster.

The pipeline's tasks for silos call `launch`. On one machine, and with ``launcher: pod``, the work is a supervised child of the task; a task
that was placed with ``launcher: job`` finds that word in its environment, and only creates the Job and follows it.
"""

from __future__ import annotations

import os

from silotune.components import silo_job
from silotune.components.federation import Federation
from silotune.components.protocol import Turn

LAUNCHER_VARIABLE = "SILOTUNE_LAUNCHER"  # in a placed task of a silo: job | pod


def launch(box: str, federation_file: str, silo_id: str, *arguments: str, turn: Turn | None = None) -> str:
    """Have a silo's box worked and return its status.

    Args:
        box: ``preprocess``, ``train``, ``share``, ``mask``, ``confirm``, ``unmask`` or ``evaluate``.
        turn: the attempt to report a failure to, where a round is open.

    Raises:
        FederationError: the federation file cannot be read, or does not name the silo.
    """
    if os.environ.get(LAUNCHER_VARIABLE) != "job":
        return silo_job.supervise(box, federation_file, silo_id, *arguments, turn=turn)
    from silotune.components.cluster import cluster_job

    return cluster_job.run(Federation.load(federation_file), silo_id, box, *arguments)
