"""muster as a box of the DAG: the silos' statuses in, the round out for those who go on to a stage of the secure sum, or why none does."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def muster(federation: str, turn: str, stage: str, statuses: list) -> str:
    from silotune.components.muster.step import run

    return run(federation, turn, stage, statuses)
