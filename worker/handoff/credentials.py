"""Who may join a link and who may read it: the token, mutual TLS, and plain TCP on loopback only.

token --> metadata of each stream, compared in constant time
Tls (PEM of certificate, key, authority) --> gRPC credentials of both ends
address, Tls or none, settings --check_plaintext--> may be used, or PlaintextRefusedError
"""

import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from pomarium.worker.handoff.errors import CredentialsError, PlaintextRefusedError
from pomarium.worker.handoff.settings import GrpcOptions, HandoffSettings

AUTHORIZATION = "authorization"
RACK_NAME = "pomarium-rack"
"""The DNS name that a rack's certificates carry, whatever the address of their Mac."""


@dataclass(frozen=True)
class Tls:
    """One Mac's identity within a rack, and the authority that signed all of them; PEM.

    Raises CredentialsError for text that is no PEM.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes

    def __post_init__(self) -> None:
        for name, text, mark in (
            ("certificate", self.certificate, b"-----BEGIN CERTIFICATE-----"),
            ("key", self.key, b"PRIVATE KEY-----"),
            ("authority", self.authority, b"-----BEGIN CERTIFICATE-----"),
        ):
            if mark not in text:
                raise CredentialsError(
                    f"The rack's {name} is not in PEM form: give the text that holds {mark.decode()}."
                )


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a stream."""
    return ((AUTHORIZATION, f"Bearer {token}"),)


def is_bearer(metadata: Sequence[tuple[str, str | bytes]], token: str) -> bool:
    """Whether `metadata` proves `token`; takes the same time for every wrong one."""
    offered = str(dict(metadata).get(AUTHORIZATION, "")).encode()
    return hmac.compare_digest(offered, f"Bearer {token}".encode())


def check_plaintext(address: str, tls: Tls | None, settings: HandoffSettings) -> None:
    """Raises PlaintextRefusedError if others could read or alter what passes through `address` (HOST:PORT)."""
    if tls is None and not settings.allow_plaintext and not _is_loopback(address):
        raise PlaintextRefusedError(
            f"Tensors would cross the network to {address} in plain text: give the rack's certificate, "
            "or set allow_plaintext=True in HandoffSettings if nobody else can reach that network."
        )


def bind(server: grpc.Server, address: str, tls: Tls | None) -> int:
    """Opens `address` (HOST:PORT, port 0 for a free one) and nothing else; returns the port.

    Raises CredentialsError if the certificate and key cannot be used, OSError if the address cannot.
    """
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)], tls.authority, require_client_auth=True)
        return int(server.add_secure_port(address, credentials))
    except RuntimeError:  # gRPC does not say which of the two it was
        _check_free(address)
        raise CredentialsError(
            "The rack's certificate and key cannot be used: give a certificate in PEM form and its own key."
        ) from None


def open_channel(address: str, tls: Tls | None, options: GrpcOptions) -> grpc.Channel:
    """A channel to a server that `bind` opened, not yet connected."""
    if tls is None:
        return grpc.insecure_channel(address, options)
    credentials = grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate)
    return grpc.secure_channel(address, credentials, (*options, ("grpc.ssl_target_name_override", RACK_NAME)))


def _check_free(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_server((host.strip("[]"), int(port)), family=_family(host)):
            pass
    except OSError as error:
        raise OSError(f"cannot listen on {address}: {error.strerror}") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
