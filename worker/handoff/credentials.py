"""Who may join a link and who may read it: the token, mutual TLS, and plain TCP on loopback only.

token --> metadata of each stream, compared in constant time
POMARIUM_TLS (a folder) --tls_of--> Tls (PEM of certificate, key, authority) --> gRPC credentials of both ends
address, Tls or none, what is allowed --check_private--> may be used, or PlaintextRefusedError

The control stream between engine and worker keeps the same rules with the same functions (cluster/executor/). Who
writes the folder is cluster/rack/identity.py.
"""

import hmac
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from pomarium.worker.address import family, host_of, is_loopback
from pomarium.worker.errors import SettingsError
from pomarium.worker.handoff.errors import CredentialsError, PlaintextRefusedError
from pomarium.worker.handoff.settings import GrpcOptions, HandoffSettings

AUTHORIZATION = "authorization"
RACK_NAME = "pomarium-rack"
"""The DNS name that a rack's certificates carry, whatever the address of their Mac."""

TLS_VARIABLE = "POMARIUM_TLS"
"""The folder with this Mac's identity: CERTIFICATE_FILE, KEY_FILE, AUTHORITY_FILE."""
PLAINTEXT_VARIABLE = "POMARIUM_ALLOW_PLAINTEXT"
CERTIFICATE_FILE, KEY_FILE, AUTHORITY_FILE = "certificate.pem", "key.pem", "authority.pem"


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


def read_tls(folder: Path) -> Tls:
    """The identity in `folder`. Raises SettingsError for a file that cannot be read or holds something else."""
    texts = []
    for name in (CERTIFICATE_FILE, KEY_FILE, AUTHORITY_FILE):
        try:
            texts.append((folder / name).read_bytes())
        except OSError as error:
            raise SettingsError(
                f"The rack's identity cannot be read: {folder / name}: {error.strerror}; set {TLS_VARIABLE} to the "
                f"folder with {CERTIFICATE_FILE}, {KEY_FILE} and {AUTHORITY_FILE}, or let this Mac join the rack again."
            ) from error
    try:
        return Tls(*texts)
    except CredentialsError as error:
        raise SettingsError(f"The rack's identity in {folder} is damaged: {error}") from error


def tls_of(environ: Mapping[str, str]) -> Tls | None:
    """The identity in the folder that POMARIUM_TLS names; None if it is not set. Raises SettingsError."""
    folder = environ.get(TLS_VARIABLE)
    if folder is None:
        return None
    if not Path(folder).is_absolute():
        raise SettingsError(f"{TLS_VARIABLE}={folder!r} is not accepted: set it to the absolute path of a folder.")
    return read_tls(Path(folder))


def plaintext_allowed(environ: Mapping[str, str]) -> bool:
    """Whether the user said that nobody else reaches the rack's network. Raises SettingsError."""
    text = environ.get(PLAINTEXT_VARIABLE, "0")
    if text not in ("0", "1"):
        raise SettingsError(f"{PLAINTEXT_VARIABLE}={text!r} is not accepted: set it to 1 or 0.")
    return text == "1"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a stream."""
    return ((AUTHORIZATION, f"Bearer {token}"),)


def is_bearer(metadata: Sequence[tuple[str, str | bytes]], token: str) -> bool:
    """Whether `metadata` proves `token`; takes the same time for every wrong one."""
    offered = str(dict(metadata).get(AUTHORIZATION, "")).encode()
    return hmac.compare_digest(offered, f"Bearer {token}".encode())


def check_plaintext(address: str, tls: Tls | None, settings: HandoffSettings) -> None:
    """As `check_private`, for a handoff."""
    check_private(address, tls, settings.allow_plaintext)


def check_private(address: str, tls: Tls | None, allow_plaintext: bool) -> None:
    """Raises PlaintextRefusedError if others could read or alter what passes through `address` (HOST:PORT)."""
    if tls is None and not allow_plaintext and not is_loopback(address):
        raise PlaintextRefusedError(
            f"Requests and tensors would cross the network at {address} in plain text: give the rack's certificate "
            f"({TLS_VARIABLE}), or set {PLAINTEXT_VARIABLE}=1 (allow_plaintext=True in HandoffSettings) if nobody else "
            "can reach that network."
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
    host, port = host_of(address), int(address.rpartition(":")[2])
    try:
        with socket.create_server((host, port), family=family(host)):
            pass
    except OSError as error:
        raise OSError(f"cannot listen on {address}: {error.strerror}") from None
