"""confirm as a box of the DAG: the round and its survivors in, the silo's status out; its signature under them lies in the store."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def confirm(federation: str, silo: str, turn: str) -> str:
    from silotune.components.confirm.step import run

    return run(federation, silo, turn)
