"""Variables that keep programs from asking the environment's proxy for a host.

The ones that libraries agree on (requests, urllib, gRPC, curl). Where a variable says it, urllib and requests do not
look at macOS's own settings either.
"""

from collections.abc import Mapping

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")
"""Variables that name one."""

NAMES = ("no_proxy", "NO_PROXY")
"""Some read the one, some the other; the small one counts where both are set."""


LOOPBACK = "127.0.0.1"


def direct(environ: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """What to add to `environ` so that `hosts` are reached without a proxy; what was excepted before stays so."""
    before = next((environ[name] for name in NAMES if environ.get(name)), "")
    excepted = [part for part in before.split(",") if part]
    if "*" not in excepted:
        excepted += [host for host in hosts if host not in excepted]
    return dict.fromkeys(NAMES, ",".join(excepted))


def straight(environ: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """`direct` for this machine and `hosts` where `environ` names a proxy, else nothing.

    Ray's processes take it: they send their metrics to their node's agent through gRPC, which would ask the proxy.
    """
    return direct(environ, LOOPBACK, *hosts) if proxied(environ) else {}


def proxied(environ: Mapping[str, str]) -> bool:
    """Whether `environ` names a proxy."""
    return any(environ.get(name) for name in PROXIES)
