"""Waiting with an end: for what, how long, and what was seen last."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from silotune.components.errors import SilotuneError

T = TypeVar("T")


class NotSeen(AssertionError):
    """What was waited for has not come."""


class Hopeless(Exception):
    """Raised while looking: it will not come any more."""


def wait_for(
    what: str, look: Callable[[], T | None], seconds: float, *, seen: Callable[[], object] | None = None, every: float = 2.0
) -> T:  # fmt: skip
    """The first answer that is true.

    Args:
        what: for the message, such as "the Job of north to run".
        look: an API that is away for a moment (UnreachableError, the clients' own errors) is asked again.
        seen: how things stand, for the message.

    Raises:
        NotSeen: not within ``seconds``, or ``look`` has given up.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    end, last = time.monotonic() + seconds, ""
    while True:
        try:
            if found := look():
                return found
            last = ""
        except Hopeless as gone:
            raise NotSeen(f"waited for {what}; it will not come: {gone}{_state(seen)}") from None
        except ApiException as error:
            if error.status and error.status < 500 and error.status not in (404, 409, 429):
                raise
            last = f"; the API server said {error.status} {error.reason}"
        except (HTTPError, OSError, SilotuneError) as error:
            last = f"; the last look failed: {type(error).__name__}: {error}"
        if time.monotonic() >= end:
            raise NotSeen(f"waited {seconds:.0f} s for {what}, in vain{last}{_state(seen)}")
        time.sleep(every)


def _state(seen: Callable[[], object] | None) -> str:
    return f"; how it stands: {seen()}" if seen else ""
