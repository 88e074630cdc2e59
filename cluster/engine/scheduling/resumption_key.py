"""How a request's tokens come to the scheduler of another process that goes on with it (resumed.py)."""

OUTPUTS = "pomarium_outputs"
"""Key of SamplingParams.extra_args; its value is a list of token ids. No client may set it."""
