"""File descriptors: macOS gives a terminal's processes 256, and each connection, log and library of Ray's takes one.

    a command, an agent --raise_limit--> its soft limit --inherited--> Ray's nodes, engines, workers

Jobs of launchd begin with what their SoftResourceLimits say.
"""

import resource
from collections.abc import Callable

WANTED = 65536
"""What vLLM's server asks for itself; for an endpoint with thousands of clients."""
SAFE = 10240
"""OPEN_MAX of macOS: its setrlimit refuses more where the hard limit is infinite, unless kern.maxfilesperproc is higher
(getrlimit(2), "Compatibility")."""

Limits = tuple[int, int]


def candidates(soft: int, hard: int) -> tuple[int, ...]:
    """The soft limits to be tried, the largest first; none that would lower it."""
    most = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft == resource.RLIM_INFINITY:
        return ()
    return tuple(sorted({limit for limit in (most, min(most, SAFE)) if limit > soft}, reverse=True))


def raise_limit(
    get: Callable[[int], Limits] = resource.getrlimit, put: Callable[[int, Limits], None] = resource.setrlimit
) -> int:
    """Raise this process's soft limit as far as the system lets it, the hard one untouched. Returns what it is then."""
    soft, hard = get(resource.RLIMIT_NOFILE)
    for limit in candidates(soft, hard):
        try:
            put(resource.RLIMIT_NOFILE, (limit, hard))
        except (ValueError, OSError):  # more than this system gives one process
            continue
        return limit
    return soft
