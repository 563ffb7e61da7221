"""evaluate as a box of the DAG: after the last round, the silo's status out."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def evaluate(federation: str, silo: str, turn: str) -> str:
    from silotune.components.evaluate.step import run

    return run(federation, silo, turn)
