"""share as a box of the DAG: the round and its roster in, the silo's status out; its secrets lie in the store, shared out and sealed."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def share(federation: str, silo: str, turn: str) -> str:
    from silotune.components.share.step import run

    return run(federation, silo, turn)
