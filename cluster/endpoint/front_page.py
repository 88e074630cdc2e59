"""The page at `/`: one HTML document, with its style and script in it, that loads nothing from anywhere.

    page/page.html, page.css, page.js --page--> the document, and headers that allow just its own script and style

The files are as a browser takes them; there is no build. The page reads `/v1/rack` (rack_view.py) and asks
`/v1/chat/completions`, with the API key that its user gives it.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "page"
STYLE, SCRIPT = '<link rel="stylesheet" href="page.css">', '<script type="module" src="page.js"></script>'
NEEDS_KEY = ' data-key="needed"'
HTML = "text/html"


@dataclass(frozen=True)
class Page:
    """content: the document. headers: of HTTP."""

    content: str
    headers: Mapping[str, str]


@cache
def page(needs_key: bool) -> Page:
    """needs_key: requests have to carry one, so that the page asks for it before it asks for anything else."""
    style, script = (FOLDER.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = FOLDER.joinpath("page.html").read_text(encoding="utf-8")
    content = html.replace(STYLE, f"<style>{style}</style>").replace(SCRIPT, f'<script type="module">{script}</script>')
    if needs_key:
        content = content.replace("<html", f"<html{NEEDS_KEY}", 1)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept",
        "X-Content-Type-Options": "nosniff",
    }
    return Page(content, headers)


def wanted(accept: str) -> bool:
    """Whether a client that sends this Accept header is a browser: curl and SDKs take anything, and name no HTML."""
    return any(part.partition(";")[0].strip().lower() == HTML for part in accept.split(","))


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
