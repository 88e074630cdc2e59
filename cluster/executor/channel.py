"""gRPC settings of the control stream, the same at both ends, and what its refusals mean.

A peer that is killed closes its socket and is seen at once. A peer that is frozen (SIGSTOP, power or cable lost) closes
nothing: the engine pings each second and gives a ping PING_TIMEOUT_S. `ping_timeout_ms` has to be set beside
`keepalive_timeout_ms`, for gRPC takes the larger (60 s by default) of the two. The worker answers pings in gRPC's own
threads, also while Python holds the interpreter lock for long.
"""

PING_INTERVAL_S = 1.0
PING_TIMEOUT_S = 4.0

_COMMON: tuple[tuple[str, int], ...] = (
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    ("grpc.keepalive_time_ms", int(PING_INTERVAL_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.enable_retries", 0),
    # A proxy of the environment must never come between an engine and its worker.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    # The other direction: a worker whose engine's node is gone ends itself. Slower, so that an engine held in a
    # debugger does not lose its worker.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 30_000),
)


def explain(details: str) -> str | None:
    """What is wrong with the identities of the two ends, as a sentence about the peer without its full stop.

    None if gRPC's `details` of a connection that did not come about speak of something else. They carry BoringSSL's
    reason (its `ssl.h`), which gRPC does not give in any other way.
    """
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "it shows a certificate of another rack: let both machines join with the same rack key"
    if "WRONG_VERSION_NUMBER" in details:
        return "it does not use TLS and this machine does: set POMARIUM_TLS on both or on neither"
    return None


def is_cut(details: str) -> bool:
    """Whether the peer accepted the connection and closed it without a word, as one does that asks for a certificate
    and is shown none or another rack's (in TLS 1.3 it finds that out after the client is done)."""
    return any(words in details for words in ("Socket closed", "Connection reset", "Broken pipe"))
