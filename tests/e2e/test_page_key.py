"""The page in a headless Chromium over a `pomarium serve` that takes a key (guarded.py)."""

from urllib.parse import urlsplit

import pytest
from chromium import browser, has, shows
from guarded import KEY, Guarded

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SOON_S = 90.0


def test_with_a_key_it_shows_what_the_endpoint_serves(guarded_server: Guarded) -> None:
    with browser() as chromium, chromium.opened(guarded_server.url) as tab:
        tab.until(has("This endpoint takes a key"), SOON_S)
        tab.type(KEY)
        tab.press("Enter")
        tab.until(shows(".model", "tiny", "serving"), SOON_S)
        assert tab.places == {urlsplit(guarded_server.url).netloc}
        assert tab.faults == []
