"""aggregate as a box of the DAG: the silos' statuses in, the next open round out, and what Kubeflow shows of the round."""

from kfp import dsl


@dsl.component(base_image="python:3.11-slim", install_kfp_package=False)
def aggregate(federation: str, turn: str, statuses: list, metrics: dsl.Output[dsl.Metrics], page: dsl.Output[dsl.Markdown]) -> str:
    from silotune.components.aggregate.step import run
    from silotune.components.round_page import write

    following = run(federation, turn, statuses)
    metrics.metadata.update(write(federation, turn, page.path))
    return following
