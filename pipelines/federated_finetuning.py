"""The DAG: preprocess in every silo, initialize, then rounds of {train in every silo, aggregate}, evaluate in every silo, export.

With ``privacy.secure_aggregation``, train keeps its update in the silo, and share, mask, confirm and unmask bring the sum of all: before each of
these four a muster task fixes which silos go on, by what they have put into the store.

Where silos are more than ``aggregation.fan_in`` and their updates can be summed in groups, each round has a combine task per group between train
and aggregate. Everything is unrolled when it is compiled, over silos and over the rounds of one run. Tasks hand each other short texts only: statuses of
silos, and the *turn*, which says which round is open. A round whose work is done already, by an earlier run or because the federation has
converged, passes quickly. Caching is off throughout: whether a step has anything to do is for the store to say.
"""

# No postponed annotations here: kfp reads a pipeline's types at run time.
from typing import Any

from kfp import dsl

from silotune.components.aggregate.component import aggregate
from silotune.components.combine.component import combine
from silotune.components.confirm.component import confirm
from silotune.components.errors import FederationError
from silotune.components.evaluate.component import evaluate
from silotune.components.export.component import export
from silotune.components.federation import Federation
from silotune.components.federation_file import COORDINATOR
from silotune.components.initialize.component import initialize
from silotune.components.mask.component import mask
from silotune.components.muster.component import muster
from silotune.components.preprocess.component import preprocess
from silotune.components.share.component import share
from silotune.components.train.component import train
from silotune.components.unmask.component import unmask
from silotune.pipelines.container_plan import PARTY_VARIABLE, Images
from silotune.pipelines.placement import place, place_coordinator

MOST_TRAININGS = 200  # silos x rounds that fit into one workflow object (Argo: 1.5 MB)
SECURE_TASKS = 5  # of a silo in a round of secure aggregation: train, share, mask, confirm, unmask


def federated_finetuning(federation: Federation, rounds: int, *, placed: bool = False, images: Images | None = None) -> Any:
    """The pipeline of a federation, ready for `kfp.compiler` or `kfp.local`.

    Args:
        federation: names the silos.
        rounds: how many rounds one run works on.
        placed: for a cluster: each task says what it needs there.
        images: for Docker on this machine: each task names its image, and whose it is.

    Raises:
        FederationError: more silo-trainings than one run can hold, or a placement that cannot be given.
    """
    silos = federation.silo_ids
    groups = federation.aggregation.groups(silos)
    secure = federation.privacy.secure_aggregation is not None
    tasks = SECURE_TASKS if secure else 1
    if len(silos) * rounds * tasks > MOST_TRAININGS:
        what = "silos' tasks with secure aggregation" if secure else "trainings"
        raise FederationError(
            f"rounds.per_run: {len(silos)} silos × {rounds} rounds are {len(silos) * rounds * tasks} {what}, one run holds {MOST_TRAININGS}; "
            f"set per_run to at most {max(1, MOST_TRAININGS // (tasks * len(silos)))} and run again for the rest"
        )

    def of_silo(component: Any, silo: str, **arguments: Any) -> Any:
        task = _named(component(silo=silo, **arguments), f"{component.name} {silo}")
        if images:
            return task.set_container_image(images.silo).set_env_variable(PARTY_VARIABLE, silo)
        return place(task, federation, silo, component.name, coordinator_image=federation.coordinator_image) if placed else task

    def of_coordinator(component: Any, number: str = "", **arguments: Any) -> Any:
        task = _named(component(**arguments), f"{component.name} {number}".rstrip())
        builds_model = component in (initialize, export)
        if images:
            image = images.silo if builds_model else images.coordinator
            return task.set_container_image(image).set_env_variable(PARTY_VARIABLE, COORDINATOR)
        wanted = (builds_model and federation.model_image) or federation.coordinator_image
        return place_coordinator(task, federation, component.name, image=wanted or None) if placed else task

    @dsl.pipeline(name="federated-round", description="Train in every silo, then aggregate.")
    def federated_round(federation: str, turn: str) -> str:
        trained = {s: of_silo(train, s, federation=federation, turn=turn) for s in silos}
        combined = [
            of_coordinator(combine, n, federation=federation, turn=turn, group=n, statuses=_outputs([trained[s] for s in group]))
            for n, group in ((str(i), group) for i, group in enumerate(groups, 1))
        ]
        done = list(trained.values())
        for stage in (share, mask, confirm, unmask) if secure else ():
            going = of_coordinator(muster, stage.name, federation=federation, turn=turn, stage=stage.name, statuses=_outputs(done)).output
            done += [of_silo(stage, s, federation=federation, turn=going) for s in silos]
        aggregated = of_coordinator(aggregate, federation=federation, turn=turn, statuses=_outputs(done))
        return aggregated.after(*combined).outputs["Output"]

    @dsl.pipeline(name=f"silotune-{federation.name}", description=f"Federated fine-tuning of {federation.name}.")
    def pipeline(federation: str) -> str:
        preprocessed = [of_silo(preprocess, s, federation=federation) for s in silos]
        turn = of_coordinator(initialize, federation=federation, statuses=_outputs(preprocessed)).output
        for i in range(rounds):
            turn = _named(federated_round(federation=federation, turn=turn), f"round slot {i + 1}").output
        evaluated = [of_silo(evaluate, s, federation=federation, turn=turn) for s in silos]
        return of_coordinator(export, federation=federation, turn=turn, statuses=_outputs(evaluated)).output

    return pipeline


def _named(task: Any, name: str) -> Any:
    return task.set_caching_options(False).set_display_name(name)


def _outputs(tasks: list[Any]) -> list[Any]:
    return [task.output for task in tasks]
