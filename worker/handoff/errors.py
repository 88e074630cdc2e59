"""How a link between two stages ends: one class for each reason, the same at both ends.

    finder raises X --as_refusal--> Refusal{name of X, sentence} --from_refusal--> X at the other end

All are permanent: a link that failed stays failed, and every later send or receive raises the same error. What TCP or a
passing outage does is no error while the link can still be resumed.
"""

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.errors import PomariumError


class HandoffError(RuntimeError):
    """A link failed. The base class itself: the stage at the other end failed, and says why."""


class EpochError(HandoffError):
    """The peer belongs to another plan."""


class SessionError(HandoffError):
    """The peer is not the one that began this link, or it cannot take up where the link was cut."""


class GapError(HandoffError):
    """A chunk is missing, or chunks came out of order."""


class ChecksumError(HandoffError):
    """A frame arrived altered."""


class MalformedFrameError(HandoffError):
    """A message that is no frame, or a frame that its place in the stream does not admit."""


class TensorError(HandoffError):
    """Name, dtype, shape or size of a tensor is not what was announced or expected."""


class StepError(HandoffError):
    """A step came that was not the one asked for, or one older than the last."""


class CreditError(HandoffError):
    """The sender put more in flight than the receiver lets it."""


class PeerLostError(HandoffError):
    """The peer was away for longer than the deadline."""


class PeerRefusedError(HandoffError):
    """The peer's server turned the connection away: another token, a rank that it has no inbox for, another version."""


class LinkClosedError(HandoffError):
    """The link was closed, by this end or the other, and no fault was reported."""


class HandoffTimeoutError(HandoffError, TimeoutError):
    """A send or a receive did not end within its time. The link itself goes on."""


class PlaintextRefusedError(PomariumError):
    """An address beyond loopback without TLS."""


class CredentialsError(PomariumError):
    """A certificate, key or authority that cannot be used."""


_REASONS: dict[str, type[HandoffError]] = {
    kind.__name__: kind
    for kind in (
        EpochError, SessionError, GapError, ChecksumError, MalformedFrameError, TensorError, StepError, CreditError,
        PeerLostError, LinkClosedError,
    )
}  # fmt: skip


def as_refusal(error: HandoffError) -> pb.Refusal:
    """What the other end is told."""
    return pb.Refusal(error=type(error).__name__, message=str(error))


def from_refusal(refusal: pb.Refusal) -> HandoffError:
    """What the other end found, to be raised at this one. An unknown name gives the base class."""
    return _REASONS.get(refusal.error, HandoffError)(refusal.message)
