"""The form of calls that an answer has to consist of: each has a name and parameters, and nothing behind them.

    tool_choice "required" --vllm/tool_parsers/utils.py--> JSON schema of calls --closed--> the same without other keys

vLLM's schema leaves other keys open. What a model writes there is streamed as the end of the arguments, which then are
no JSON; vLLM 0.29. It is taken where structural tags, vLLM's other way to the form of a call, are not
(intake/defaults.py).
"""

from typing import Any

from vllm.tool_parsers import utils

_schema_of_call = utils._get_tool_schema_from_name_and_params


def install() -> None:
    """Close the schemas of this process's front ends. Calling it again changes nothing."""
    utils._get_tool_schema_from_name_and_params = _closed


def _closed(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {**_schema_of_call(name, parameters), "additionalProperties": False}
