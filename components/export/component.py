"""export as a box of the DAG: the silos' statuses in, where the model was put out."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def export(federation: str, turn: str, statuses: list) -> str:
    from silotune.components.export.step import run
    from silotune.components.recurrence import end_when_done

    location = run(federation, turn, statuses)
    end_when_done(federation, turn)
    return location
