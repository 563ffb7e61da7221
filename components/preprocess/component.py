"""preprocess as a box of the DAG: federation file and silo in, status out."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def preprocess(federation: str, silo: str) -> str:
    from silotune.components.preprocess.step import run

    return run(federation, silo)
