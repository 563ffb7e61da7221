"""The API server's part in a ValidatingAdmissionPolicy, in Python: which validations refuse a Job.

CEL is evaluated by cel-python. An expression that ends in an error refuses, as ``failurePolicy: Fail`` has it; a variable that does is an error
only where it is used.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import celpy

Object = dict[str, Any]


@cache
def _program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def _value(expression: str, names: dict[str, Any]) -> Any:
    return _program(expression).evaluate(names)


LAUNCHER = "system:serviceaccount:silotune:silotune-launcher"


def refusals(policy: Object, terms: Object, job: Object, user: str = LAUNCHER) -> list[str]:
    """The first word of the message of each validation that refuses.

    Args:
        user: who creates it.
    """
    assert policy["spec"]["failurePolicy"] == "Fail"
    variables = celpy.celtypes.MapType()
    request = celpy.json_to_cel({"userInfo": {"username": user}})
    names: dict[str, Any] = {
        "object": celpy.json_to_cel(job), "params": celpy.json_to_cel(terms), "variables": variables, "request": request,
    }  # fmt: skip
    for variable in policy["spec"]["variables"]:
        with contextlib.suppress(celpy.CELEvalError):
            variables[celpy.celtypes.StringType(variable["name"])] = _value(variable["expression"], names)
    refused = []
    for validation in policy["spec"]["validations"]:
        try:
            holds = bool(_value(validation["expression"], names))
        except celpy.CELEvalError:
            holds = False
        if not holds:
            refused.append(validation["message"].split(":")[0])
    return refused
