"""The API server's part in a ValidatingAdmissionPolicy, in Python: which validations refuse a Job.

CEL is evaluated by cel-python. An expression that ends in an error refuses, as ``failurePolicy: Fail`` has it.
"""

from __future__ import annotations

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


def refusals(policy: Object, terms: Object, job: Object) -> list[str]:
    """The first word of the message of each validation that refuses."""
    assert policy["spec"]["failurePolicy"] == "Fail"
    variables = celpy.celtypes.MapType()
    names: dict[str, Any] = {"object": celpy.json_to_cel(job), "params": celpy.json_to_cel(terms), "variables": variables}
    for variable in policy["spec"]["variables"]:
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
