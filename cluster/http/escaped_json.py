"""JSON answers that can hold any text of a client.

JSON may name half of a surrogate pair (RFC 8259, section 8.2), such as text that was cut inside an emoji; UTF-8 has no
form of it. Such a half leaves as the escape that it came as, everything else as UTF-8.
"""

import json
from typing import Any

from starlette.responses import JSONResponse


class EscapedJson(JSONResponse):
    """Starlette's JSON response, which raises UnicodeEncodeError where this one escapes."""

    def render(self, content: Any) -> bytes:
        """`content` as JSON in UTF-8."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode(errors="backslashreplace")  # surrogates occur in strings alone, and \udXXX is their escape
