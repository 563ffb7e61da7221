"""confirm: in a silo, the set of silos is signed whose sum it is asked to open, so that all see whether all are shown the same. See `secure_sum.silo`.

python -m silotune.components.confirm.step FEDERATION SILO "round:1 attempt:1"
"""

from __future__ import annotations

import sys

from silotune.components import launcher
from silotune.components.protocol import Turn
from silotune.components.secure_sum import silo as secure_silo
from silotune.components.silo_job import status_text


def run(federation: str, silo: str, turn: str) -> str:
    """As a pipeline task: launched, and nothing at all where no roster calls for it."""
    if Turn.parse(turn).done:
        return status_text(silo, "ok", "nothing to do")
    return launcher.launch("confirm", federation, silo, turn)


def work(federation_file: str, silo_id: str, turn_text: str) -> str:
    """Returns the status."""
    return secure_silo.work("confirm", federation_file, silo_id, turn_text)


if __name__ == "__main__":
    print(work(*sys.argv[1:]))
