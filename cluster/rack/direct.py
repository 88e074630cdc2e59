"""Variables that keep programs from asking the environment's proxy for a host.

The ones that libraries agree on (requests, urllib, gRPC, curl). Where a variable says it, urllib and requests do not
look at macOS's own settings either.
"""

from collections.abc import Mapping

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")
"""Variables that name one."""

NAMES = ("no_proxy", "NO_PROXY")
"""Some read the one, some the other; the small one counts where both are set."""


def direct(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """What to add to `environ` so that `host` is reached without a proxy; what was excepted before stays so."""
    before = next((environ[name] for name in NAMES if environ.get(name)), "")
    excepted = [part for part in before.split(",") if part]
    return dict.fromkeys(NAMES, ",".join(excepted if host in excepted or "*" in excepted else [*excepted, host]))


def proxied(environ: Mapping[str, str]) -> bool:
    """Whether `environ` names a proxy."""
    return any(environ.get(name) for name in PROXIES)
