"""What a model's name becomes where Ray takes no other than short ASCII.

    name --label--> tags of metrics        name --deployment_name--> Serve's deployments, their actors and log files

Ray encodes the tags of metrics as ASCII (python/ray/includes/metric.pxi) and raises in whatever process records one
that is not: Serve's controller would start an engine for ever. Requests, `/v1/models` and `rack status` have the name
as it is.
"""

import hashlib
import re
import unicodedata
from urllib.parse import quote

from pomarium.worker.errors import SettingsError

ENGINE_PREFIX = "engine:"

PLAIN = re.compile(r"[A-Za-z0-9._]+(?:[-/][A-Za-z0-9._]+)*")
LONGEST_PLAIN = 100
"""Characters. A deployment's name is a part of its log files' names, which may have 255 bytes."""

LONGEST_READABLE = 40
DIGEST = 12

LABEL_SAFE = "".join(c for c in map(chr, range(0x20, 0x7F)) if c != "%")


def check(name: str) -> None:
    """Raises SettingsError for a name that no request could carry: empty, with control characters, or not text."""
    if not name.strip():
        raise SettingsError("A model's name is empty: give one with --served-name.")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise SettingsError(
            f"The model's name {name!a} has characters that are no text (line ends, control characters or bytes of "
            "another encoding): give another with --served-name."
        )


def deployment_name(model: str) -> str:
    """Serve's name for a model's engines, another one for each model: `engine:` and its name with -- for /.

    Names that have anything but letters, digits, ".", "_", single "-" and "/" of ASCII, or are long, are shortened to
    what can be read of them, and carry the first digits of their SHA-256.
    """
    if PLAIN.fullmatch(model) and len(model) <= LONGEST_PLAIN:
        return ENGINE_PREFIX + model.replace("/", "--")
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", model)[:LONGEST_READABLE].strip("-")
    digest = hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST]
    return f"{ENGINE_PREFIX}{readable}~{digest}"


def label(name: str) -> str:
    """`name` as the value of a metric's tag: printable ASCII, other characters percent-encoded as UTF-8."""
    if name.isascii() and name.isprintable():
        return name
    return quote(name, safe=LABEL_SAFE, errors="surrogatepass")
