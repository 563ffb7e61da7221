"""mask as a box of the DAG: the round and its roster in, the silo's status out; its update lies in the store, masked."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def mask(federation: str, silo: str, turn: str) -> str:
    from silotune.components.mask.step import run

    return run(federation, silo, turn)
