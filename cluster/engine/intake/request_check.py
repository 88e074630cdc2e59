"""vLLM's check of a request, as the platform's: the same bounds as guard.py, for requests that did not come over HTTP.

Over HTTP the guard has asked the same already, in a thread, and `grammars` remembers what it found.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from pomarium.cluster.engine.intake import constraints, grammars


def check(params: Any) -> None:
    """Raises VLLMValidationError, which is 400 over HTTP, for a constraint that is not to be compiled."""
    if not isinstance(params, SamplingParams) or params.structured_outputs is None:
        return
    constraint = constraints.of_params(params.structured_outputs)
    if constraint is None:
        return
    reason = constraints.refusal(constraint)
    if reason is None and params.structured_outputs._backend == "guidance":
        reason = grammars.fault(constraint)
    if reason is not None:
        raise VLLMValidationError(reason)
