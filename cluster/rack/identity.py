"""One secret of a rack, from which all that a Mac needs to join it is derived: no file is ever copied.

    RackKey.generate() --text--> typed or pasted on each Mac --RackKey.parse--> the same RackKey
        --ray_token--> RAY_AUTH_TOKEN, the same everywhere
        --write_tls--> authority.pem, the same everywhere; certificate.pem and key.pem, this Mac's own

Derivation is HKDF with SHA-256 (RFC 5869) under one label per purpose. Every Mac derives the authority's key, so every
Mac that knows the rack key can issue its own certificate: to know the key is to be a member. The key of a certificate
is drawn where it is used and stays there. Nothing expires, because a Mac's clock may be wrong when it joins; a rack
that wants a member out takes a new key.

What reads the folder is worker/handoff/credentials.py, for workers need it.
"""

import contextlib
import datetime
import hashlib
import os
import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pomarium.worker.errors import SettingsError
from pomarium.worker.handoff.credentials import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    RACK_NAME,
    plaintext_allowed,
    read_tls,
    tls_of,
)

__all__ = ("RackKey", "plaintext_allowed", "ray_token", "read_tls", "tls_of", "write_tls")

SECRET_BYTES = 16
CHECK_BITS = 22
"""Fill the last character: a mistyped key passes once in four million times."""
SYMBOLS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's base 32 (www.crockford.com/base32.html): no I, L, O (read as 1, 1, 0) and no U."""
LENGTH = (8 * SECRET_BYTES + CHECK_BITS) // 5
GROUP = 5

_MISREAD = str.maketrans("ILO", "110", "- \t\r\n")
_SALT = b"pomarium rack v1"
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_BEGIN = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NEVER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
"""RFC 5280, 4.1.2.5: a certificate without a date of expiry."""


@dataclass(frozen=True)
class RackKey:
    """The secret of a rack: 16 random bytes. Neither `repr` nor an error shows it."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"a rack key has {SECRET_BYTES} bytes, not {len(self.secret)}")

    @classmethod
    def generate(cls) -> "RackKey":
        """A new one, from the system's random numbers."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> "RackKey":
        """The key that `text` was typed from; case, spaces and dashes do not count.

        Raises SettingsError for a typo. It does not repeat the text, which is nearly the secret.
        """
        typed = text.upper().translate(_MISREAD)
        if unknown := sorted(set(typed) - set(SYMBOLS)):
            raise SettingsError(
                f"The rack key holds {unknown[0]!r}, which no rack key does: copy it again from the Mac that made it."
            )
        if len(typed) != LENGTH:
            raise SettingsError(
                f"The rack key has {len(typed)} letters and digits instead of {LENGTH}: copy it again from the Mac "
                "that made it."
            )
        number = 0
        for symbol in typed:
            number = number << 5 | SYMBOLS.index(symbol)
        secret = (number >> CHECK_BITS).to_bytes(SECRET_BYTES, "big")
        if number & ((1 << CHECK_BITS) - 1) != _check(secret):
            raise SettingsError(
                "The rack key is mistyped, for its check characters do not fit: copy it again from the Mac that "
                "made it."
            )
        return cls(secret)

    @property
    def text(self) -> str:
        """Six groups of five letters and digits, such as 2RV8A-...: secret and check characters."""
        number = int.from_bytes(self.secret, "big") << CHECK_BITS | _check(self.secret)
        symbols = "".join(SYMBOLS[number >> 5 * place & 31] for place in reversed(range(LENGTH)))
        return "-".join(symbols[at : at + GROUP] for at in range(0, LENGTH, GROUP))


def ray_token(key: RackKey) -> str:
    """RAY_AUTH_TOKEN of the rack: 64 hexadecimal digits, as `ray get-auth-token --generate` makes them."""
    return _derive(key, b"ray token", 32).hex()


def write_tls(key: RackKey, folder: Path) -> None:
    """Issue a certificate for this Mac and write it, its key and the authority into `folder`, for its owner only.

    A folder that is there is used again, its files are replaced. Raises OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    own = ec.generate_private_key(ec.SECP256R1())
    authority_key = _authority_key(key)
    authority = _authority(authority_key)
    _write(folder / AUTHORITY_FILE, authority.public_bytes(serialization.Encoding.PEM))
    _write(
        folder / KEY_FILE,
        own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    certificate = _certificate(own.public_key(), authority, authority_key)
    _write(folder / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM))


def _check(secret: bytes) -> int:
    digest = hashlib.sha256(_SALT + b" check" + secret).digest()
    return int.from_bytes(digest, "big") >> (8 * len(digest) - CHECK_BITS)


def _derive(key: RackKey, purpose: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256; `purpose` is its info."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=_SALT, info=purpose).derive(key.secret)


def _authority_key(key: RackKey) -> ec.EllipticCurvePrivateKey:
    """FIPS 186-5, A.2.1: 64 bits more than the order has, so that the remainder is as good as uniform."""
    number = int.from_bytes(_derive(key, b"certificate authority", 40), "big")
    return ec.derive_private_key(number % (_P256_ORDER - 1) + 1, ec.SECP256R1())


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The same bytes on every Mac: serial, dates and signature (RFC 6979) are fixed by the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{RACK_NAME}-authority")])
    return (
        _builder(name, name, key.public_key(), key.public_key(), serial=1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )


def _certificate(
    own: ec.EllipticCurvePublicKey, authority: x509.Certificate, authority_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, RACK_NAME)])
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    serial = x509.random_serial_number()
    return (
        _builder(name, authority.subject, own, authority_key.public_key(), serial)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(RACK_NAME)]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    own: ec.EllipticCurvePublicKey,
    issuing: ec.EllipticCurvePublicKey,
    serial: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer, subject, own, serial, _BEGIN, _NEVER)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(own), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing), critical=False)
    )


def _usage(digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, text: bytes) -> None:
    """Whole or not at all, and never readable by others."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
