"""What can go wrong, and the exit code that says it.

An error names the thing, the rule, the value got and the cure. The exit codes are a promise to scripts and schedulers:

    0 done · 1 anything else · 2 the federation or the command is wrong · 3 quorum not reached
    4 budget or policy refuses · 5 the store or the tracking server cannot be reached (worth retrying)

``reason`` is the same in a few words from a fixed vocabulary: all that a silo ever tells the others.
"""


class SilotuneError(Exception):
    """An error with a message fit for the person who reads it; shown without a traceback."""

    exit_code = 1

    def __init__(self, message: str, reason: str = "unexpected error") -> None:
        super().__init__(message)
        self.reason = reason


class FederationError(SilotuneError):
    """The federation file, its data, its base model or the command is wrong; trying again changes nothing."""

    exit_code = 2

    def __init__(self, message: str, reason: str = "data or settings are wrong") -> None:
        super().__init__(message, reason)


class QuorumError(SilotuneError):
    """Too few silos delivered; the round stays open and a later run asks the missing ones only."""

    exit_code = 3

    def __init__(self, message: str, reason: str = "quorum not reached") -> None:
        super().__init__(message, reason)


class RefusedError(SilotuneError):
    """A rule of the protocol, a budget or a policy refuses; nothing was done."""

    exit_code = 4

    def __init__(self, message: str, reason: str = "against the protocol") -> None:
        super().__init__(message, reason)


class UnreachableError(SilotuneError):
    """The store or the tracking server cannot be reached, or has no room; worth trying again."""

    exit_code = 5

    def __init__(self, message: str, reason: str = "store unreachable or full") -> None:
        super().__init__(message, reason)
