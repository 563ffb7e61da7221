"""initialize as a box of the DAG: the silos' statuses in, the open round out."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def initialize(federation: str, statuses: list) -> str:
    from silotune.components.initialize.step import run

    return run(federation, statuses)
