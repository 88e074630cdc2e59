"""Signs of life in an answer: a replica that has nothing to say says so, and who waits for it gives up without them.

    replica/answering.py: ALIVE on each line in use, each BEAT_S --> endpoint/answers.py: SilentError after SILENCE_S

A replica whose machine lost its power or its cable sends no error and resets no connection; Ray finds out after a
minute by default. A sign shows that the replica's event loop runs: engine and workers are watched from there.
"""

BEAT_S = 1.0
"""How often a replica gives a sign of life."""

SILENCE_S = 8.0
"""How long a request waits for anything: what was running at a fault has its error within ten seconds."""


class SilentError(Exception):
    """Nothing came in time, and no sign of life."""
