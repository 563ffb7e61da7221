"""train as a box of the DAG: the open round in, the silo's status out."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def train(federation: str, silo: str, turn: str) -> str:
    from silotune.components.train.step import run

    return run(federation, silo, turn)
