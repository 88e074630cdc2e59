"""The rack key and what is derived from it."""

import hashlib
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.rack.identity import SECRET_BYTES, SYMBOLS, RackKey, ray_token, write_tls
from pomarium.worker.errors import SettingsError
from pomarium.worker.handoff.credentials import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    RACK_NAME,
    Tls,
    plaintext_allowed,
    read_tls,
    tls_of,
)

VARIABLE = "POMARIUM_ALLOW_PLAINTEXT"
KEY = RackKey(bytes(range(SECRET_BYTES)))
keys = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES).map(RackKey)


@given(keys, st.sampled_from(["", " ", "  ", "-", " - "]), st.booleans())
def test_a_key_survives_being_typed(key: RackKey, separator: str, lower: bool) -> None:
    typed = key.text.replace("-", separator)
    assert RackKey.parse(f" {typed.lower() if lower else typed}\n") == key


@given(keys)
def test_letters_that_look_alike_are_read_as_meant(key: RackKey) -> None:
    assert RackKey.parse(key.text.replace("1", "l").replace("0", "O")) == key


@given(keys, st.data())
def test_a_wrong_character_is_seen(key: RackKey, data: st.DataObject) -> None:
    symbols = list(key.text.replace("-", ""))
    place = data.draw(st.integers(0, len(symbols) - 1))
    symbols[place] = data.draw(st.sampled_from([s for s in SYMBOLS if s != symbols[place]]))
    with pytest.raises(SettingsError, match="mistyped") as caught:
        RackKey.parse("".join(symbols))
    assert "".join(symbols[:10]) not in str(caught.value), "an error must not repeat what is nearly the secret"


@given(keys, st.integers(0, 28))
def test_swapped_neighbours_are_seen(key: RackKey, place: int) -> None:
    text = key.text.replace("-", "")
    swapped = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    if swapped == text:
        assert RackKey.parse(swapped) == key
    else:
        with pytest.raises(SettingsError, match="mistyped"):
            RackKey.parse(swapped)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "0 letters and digits instead of 30"),
        (KEY.text[:-1], "29 letters"),
        (KEY.text + "0", "31"),
        (KEY.text[:-1] + "U", "'U'"),
        (KEY.text[:-1] + "é", "'É'"),
    ],
)
def test_what_is_no_key_is_refused(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        RackKey.parse(text)


@given(st.text())
def test_any_text_is_a_key_or_a_settings_error(text: str) -> None:
    try:
        key = RackKey.parse(text)
    except SettingsError:
        return
    assert RackKey.parse(key.text) == key


def test_what_is_derived_never_changes(tmp_path: Path) -> None:
    """Macs of one rack may run different versions while they are updated one by one."""
    assert KEY.text == "000G4-0R40M-30E20-9185G-R38E1-YP4QT"
    assert ray_token(KEY) == "51aca37949d5a99d14634e210ca39f7e4b7d5a86b74eca3660a6cf3dba97e3a8"
    assert hashlib.sha256(issued(tmp_path, KEY).authority).hexdigest() == (
        "973b3c7698acb844de42afc9bca3ea3416b7403aca8375029be73094470c258c"
    )


def test_the_secret_is_not_shown_by_accident() -> None:
    assert repr(KEY) == "RackKey()"
    assert RackKey.generate() != RackKey.generate()


def test_two_macs_trust_each_other_and_share_no_key(tmp_path: Path) -> None:
    one, two, stranger = (issued(tmp_path / name, key) for name, key in (("1", KEY), ("2", KEY), ("3", other())))
    assert one.authority == two.authority != stranger.authority
    assert one.key != two.key
    assert one.certificate != two.certificate
    for authority, leaf in ((one, two), (two, one), (one, one)):
        verify(authority, leaf)
    for authority, leaf in ((one, stranger), (stranger, one)):
        with pytest.raises(VerificationError):
            verify(authority, leaf)


def test_the_key_belongs_to_the_certificate(tmp_path: Path) -> None:
    tls = issued(tmp_path, KEY)
    private = serialization.load_pem_private_key(tls.key, None)
    assert private.public_key() == x509.load_pem_x509_certificate(tls.certificate).public_key()


def test_the_folder_is_its_owners_alone_and_may_be_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "tls"
    first = issued(folder, KEY)
    folder.chmod(0o755)
    second = issued(folder, KEY)
    assert second.certificate != first.certificate
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(
        (CERTIFICATE_FILE, KEY_FILE, AUTHORITY_FILE), 0o600
    )


def test_the_environment_names_the_folder(tmp_path: Path) -> None:
    tls = issued(tmp_path, KEY)
    assert tls_of({"POMARIUM_TLS": str(tmp_path)}) == tls
    assert tls_of({}) is None


@pytest.mark.parametrize("spoil", ["", "missing", "relative", "damaged"])
def test_an_identity_that_cannot_be_used_is_refused(tmp_path: Path, spoil: str) -> None:
    issued(tmp_path, KEY)
    (tmp_path / KEY_FILE).write_text("damaged")
    folder = {"": "", "missing": str(tmp_path / "missing"), "relative": "tls", "damaged": str(tmp_path)}[spoil]
    with pytest.raises(SettingsError, match="damaged" if spoil == "damaged" else "set (it|POMARIUM_TLS) to the"):
        tls_of({"POMARIUM_TLS": folder})


@pytest.mark.parametrize(("environ", "allowed"), [({}, False), ({VARIABLE: "0"}, False), ({VARIABLE: "1"}, True)])
def test_plain_text_has_to_be_allowed(environ: dict[str, str], allowed: bool) -> None:
    assert plaintext_allowed(environ) is allowed


@pytest.mark.parametrize("text", ["", "yes", "2"])
def test_a_doubtful_permission_is_none(text: str) -> None:
    with pytest.raises(SettingsError, match="set it to 1 or 0"):
        plaintext_allowed({VARIABLE: text})


def issued(folder: Path, key: RackKey) -> Tls:
    write_tls(key, folder)
    return read_tls(folder)


def other() -> RackKey:
    return RackKey(bytes(SECRET_BYTES))


def verify(authority: Tls, leaf: Tls) -> None:
    """As a client and as a server would, by the rules of RFC 5280."""
    store = Store([x509.load_pem_x509_certificate(authority.authority)])
    certificate = x509.load_pem_x509_certificate(leaf.certificate)
    PolicyBuilder().store(store).build_server_verifier(x509.DNSName(RACK_NAME)).verify(certificate, [])
    PolicyBuilder().store(store).build_client_verifier().verify(certificate, [])
