"""aggregate as a box of the DAG: the silos' statuses in, the next open round out."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def aggregate(federation: str, turn: str, statuses: list) -> str:
    from silotune.components.aggregate.step import run

    return run(federation, turn, statuses)
