"""combine as a box of the DAG: the statuses of one group's silos in, whether its updates are summed out."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def combine(federation: str, turn: str, group: str, statuses: list) -> str:
    from silotune.components.combine.step import run

    return run(federation, turn, group, statuses)
