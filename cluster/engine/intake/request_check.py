"""vLLM's check of a request, as the platform's: the same bounds as guard.py, for requests that did not come over HTTP.

Over HTTP the guard has asked most of it already, in a thread, and `grammars` remembers what it found.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from pomarium.cluster.engine.intake import constraints, grammars
from pomarium.cluster.engine.scheduling.resumption_key import OUTPUTS


def check(params: Any) -> None:
    """Raises VLLMValidationError, which is 400 over HTTP, for a constraint that is not to be compiled, and for outputs
    that the request claims to have had."""
    if not isinstance(params, SamplingParams):
        return
    if params.extra_args and OUTPUTS in params.extra_args:
        raise VLLMValidationError(f"vllm_xargs: {OUTPUTS!r} is not for clients.", parameter="vllm_xargs")
    if params.structured_outputs is None:
        return
    constraint = constraints.of_params(params.structured_outputs)
    if constraint is None:
        return
    reason = constraints.refusal(constraint)
    if reason is None and params.structured_outputs._backend == "guidance":
        reason = grammars.fault(constraint)
    if reason is not None:
        raise VLLMValidationError(reason)
