"""Links are encrypted and both ends prove who they are; plain text stays on loopback."""

import datetime
import ipaddress
from dataclasses import dataclass, replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from handoff_ends import EPOCH, FAST, TOKEN, WAIT_S, Ends, hidden, is_equal

from pomarium.worker.handoff.credentials import RACK_NAME, Tls
from pomarium.worker.handoff.errors import CredentialsError, PeerLostError, PlaintextRefusedError
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.probe import probe
from pomarium.worker.handoff.server import HandoffServer
from pomarium.worker.handoff.settings import HandoffSettings


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def identity(self) -> Tls:
        key = ec.generate_private_key(ec.SECP256R1())
        return Tls(
            pem(certificate("mac", key, self.certificate.subject, self.key)),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            pem(self.certificate),
        )


def pem(made: x509.Certificate) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name | None, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(RACK_NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder(issuer or subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    return Authority(certificate("rack", key, None, key), key)


def test_mutual_tls() -> None:
    rack = authority()
    ends = Ends(tls=rack.identity())
    try:
        outbox = Outbox.connect(ends.server.address, 0, EPOCH, TOKEN, rack.identity(), FAST)
        outbox.send(0, hidden(0, 200_000))
        assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0, 200_000))
        assert probe(ends.server.address, TOKEN, rack.identity(), FAST, 0.2).rtt_s > 0
        for stranger in (None, authority().identity()):  # the token alone is not enough
            ends.server.inbox(1 if stranger is None else 2)
            with pytest.raises(PeerLostError):
                Outbox.connect(
                    ends.server.address, 1 if stranger is None else 2, EPOCH, TOKEN, stranger, FAST, timeout_s=0.4
                )
        outbox.close()
    finally:
        ends.close()


def test_a_certificate_with_another_key_is_refused() -> None:
    one, other = authority().identity(), authority().identity()
    with pytest.raises(CredentialsError, match="cannot be used"):
        HandoffServer("127.0.0.1:0", EPOCH, TOKEN, replace(one, key=other.key))


def test_plain_text_beyond_loopback_is_refused() -> None:
    with pytest.raises(PlaintextRefusedError, match="allow_plaintext=True in HandoffSettings"):
        HandoffServer("0.0.0.0:0", EPOCH, TOKEN)
    with pytest.raises(PlaintextRefusedError):
        Outbox.connect("192.0.2.1:7", 0, EPOCH, TOKEN)
    with pytest.raises(PlaintextRefusedError):
        probe("192.0.2.1:7", TOKEN)
    HandoffServer("0.0.0.0:0", EPOCH, TOKEN, settings=HandoffSettings(allow_plaintext=True)).close()
