"""Who asks: whether a request carries a key, and whose turn it takes while requests wait (turns.py).

headers --key_of--> the key, or RefusalError      headers, address, key --client_of--> a client
"""

import hmac
from collections.abc import Hashable, Mapping, Sequence

from pomarium.cluster.http import openai_errors
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.http.protocols import BATCH, PRIORITY

LONGEST = 200
"""Characters of a given key that tell clients apart where no key is asked for."""


def key_of(headers: Mapping[str, str], keys: Sequence[bytes]) -> bytes:
    """The key of `keys` that a request carries; empty if none is asked for. Raises RefusalError (401)."""
    if not keys:
        return b""
    for given in _given(headers):
        sent = given.encode("latin-1")  # as Starlette decoded what came
        if sent and (found := [key for key in keys if hmac.compare_digest(sent, key)]):
            return found[0]
    raise RefusalError(*openai_errors.unauthorized())


def client_of(headers: Mapping[str, str], address: str, key: bytes, keys: Sequence[bytes]) -> Hashable:
    """Who takes turns with others: a key where there are several, else an address with the key that it gives, which
    nobody asked for.

    Args:
        key: as `key_of` found it.
    """
    if len(keys) > 1:
        return key
    return address, *(given[:LONGEST] for given in _given(headers))


def yields(headers: Mapping[str, str]) -> bool:
    """Whether others go first."""
    return headers.get(PRIORITY, "").strip().lower() == BATCH


def _given(headers: Mapping[str, str]) -> tuple[str, str]:
    """As OpenAI's clients send a key, and as Anthropic's do; some send both."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "").strip()
