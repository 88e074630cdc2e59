"""Sizes and times of a link, the same at both ends, and the gRPC settings that follow from them.

A peer that is killed closes its sockets: seen at once. One that is frozen (SIGSTOP, power lost) closes nothing:
both ends ping each `ping_interval_s` and give a ping `ping_timeout_s`; then the sender tries to resume for `away_s`.
With the defaults a frozen peer fails the link within 3 + 3 s. gRPC answers pings in its own threads, also while Python
holds the interpreter lock for long.
"""

from dataclasses import dataclass

MAX_CHUNK_BYTES = 4 << 20
"""No chunk is larger: gRPC refuses a longer message before it is read."""
_HEAD_BYTES = 64 << 10

GrpcOptions = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class HandoffSettings:
    """Sizes and times of a link.

    Attributes:
        chunk_bytes: larger tensors are split.
        window_bytes: a step is sent while less than this waits for the receiving stage, so that at most this and one
            step more are held at either end.
        max_step_bytes: a step that announces more is refused before memory is taken for it.
        ping_interval_s, ping_timeout_s: how a frozen peer or a broken path is seen.
        attempt_s: bound on one attempt to connect; pauses between attempts grow from pause_s to max_pause_s.
        away_s: a link that could not be resumed for so long has failed.
        allow_plaintext: no TLS beyond loopback.
    """

    chunk_bytes: int = 1 << 20
    window_bytes: int = 64 << 20
    max_step_bytes: int = 1 << 30
    ping_interval_s: float = 1.0
    ping_timeout_s: float = 2.0
    attempt_s: float = 1.0
    pause_s: float = 0.02
    max_pause_s: float = 0.5
    away_s: float = 3.0
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes must be in 1..{MAX_CHUNK_BYTES}, not {self.chunk_bytes}")
        if self.window_bytes <= 0 or self.max_step_bytes <= 0:
            raise ValueError("window_bytes and max_step_bytes must be positive")
        times = (self.ping_interval_s, self.ping_timeout_s, self.attempt_s, self.pause_s, self.max_pause_s, self.away_s)
        if min(times) <= 0:
            raise ValueError("the times of a link must be positive")

    def server_options(self) -> GrpcOptions:
        """For grpc.server."""
        return (*self._common(), ("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0))

    def client_options(self) -> GrpcOptions:
        """For a channel. Each has a connection of its own and gives up after one attempt: the outbox retries."""
        return (
            *self._common(),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.min_reconnect_backoff_ms", round(self.attempt_s * 1000)),
            # A proxy of the environment must never come between two stages.
            ("grpc.enable_http_proxy", 0),
        )

    def _common(self) -> GrpcOptions:
        return (
            ("grpc.max_send_message_length", MAX_CHUNK_BYTES + _HEAD_BYTES),
            ("grpc.max_receive_message_length", MAX_CHUNK_BYTES + _HEAD_BYTES),
            ("grpc.keepalive_time_ms", round(self.ping_interval_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.ping_timeout_s * 1000)),
            # gRPC takes the larger of this (60 s by default) and the line above.
            ("grpc.http2.ping_timeout_ms", round(self.ping_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", round(self.ping_interval_s * 1000)),
        )
