"""Errors that a user can cause and cure. Each carries one sentence: what is wrong and what to change.

The command line prints the sentence and exits with a non-zero code; over HTTP it becomes OpenAI's error body.
Anything else that is raised is a fault of ours and keeps its traceback.
"""


class PomariumError(Exception):
    """Base of the errors that are reported as one line, without a traceback."""


class SettingsError(PomariumError):
    """An environment variable or flag has a value that is not accepted."""


class DeviceError(PomariumError):
    """The GPU that MLX reports does not compute; says how to do without it."""


class CheckpointError(PomariumError):
    """A model folder or file is missing, truncated, malformed or of an unknown format."""


class UnsupportedError(PomariumError):
    """A model, quantisation or combination of options that Pomarium does not run; says which flag to change."""


class InsufficientMemoryError(PomariumError):
    """The model or one sequence of maximum length does not fit; says how much is missing."""
