"""The page at `/` in a headless Chromium: what it shows, what it asks of whom, and what it says when all is not well.

Most of it over an ingress without Ray (idle_ingress.py), the chat over `pomarium serve`. Deadlines are far off, for
busy machines.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from chromium import Browser, Tab, browser, has, shows
from endpoint_stub import app_serving
from idle_ingress import GIB, MAC, REPORT, SERVES, ingress
from serve_process import MODEL, Server

from pomarium.cluster import faults
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.node import ports
from pomarium.cluster.rack.labels import MacFacts
from pomarium.cluster.rack.reports import LinkReport, StageReport
from pomarium.cluster.rack.status import RackStatus
from pomarium.worker.errors import SettingsError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SOON_S = 90.0
ANSWERED_S = 200.0

TOO_PALE = """
[...document.querySelectorAll('body *')].filter((one) => one.offsetParent && [...one.childNodes].some(
    (child) => child.nodeType === 3 && child.data.trim())).map((one) => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (c) => c <= 0.04 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parts(colour).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = one;
  const clear = (element) => parts(getComputedStyle(element).backgroundColor)[3] === 0;
  while (behind.parentElement && clear(behind)) behind = behind.parentElement;
  const [a, b] = [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor].map(light);
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return contrast < 4.5 ? `${one.textContent}: ${contrast}` : null;
}).filter(Boolean)
"""
"""Texts whose contrast to what is behind them is less than WCAG's AA asks."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


def test_it_shows_models_macs_and_their_figures_and_asks_nobody_else(chromium: Browser) -> None:
    with app_serving(ingress()) as url, chromium.opened(url) as tab:
        tab.until(shows(".model", "m", "serving", "12.5", "25%", "50%", "mac-1 0–29"), SOON_S)
        tab.until(
            shows(".mac", "mac-1", "M2 Ultra", "alive", "1 GiB of 128 GiB", "layers 0–29", "12.5 tokens/s"), SOON_S
        )
        tab.until(shows(".plot", "Tokens per second", "12.5"), SOON_S)
        tab.until(shows(".plot", "Requests per minute", "40"), SOON_S)
        assert tab.places == {urlsplit(url).netloc}
        assert {urlsplit(address).path for address in tab.asked} == {"/", "/v1/rack"}
        assert tab.faults == []


def test_what_is_not_ours_does_not_run(chromium: Browser) -> None:
    """The policy holds: neither a script nor a picture nor a request that somebody smuggles in."""
    with app_serving(ingress()) as url, chromium.opened(url) as tab, app_serving(ingress()) as other:
        tab.until(shows(".model", "serving"), SOON_S)
        tab.script(
            "{ const one = document.createElement('script'); one.textContent = 'document.title = \"smuggled\"';"
            " document.body.append(one); const two = new Image(); two.src = '/health'; document.body.append(two); }"
        )
        assert tab.script(f"fetch({f'{other}/health'!r}).then(() => 'fetched', () => 'refused')") == "refused"
        tab.until("true", SOON_S)
        assert tab.script("document.title") == "Pomarium"
        assert sum("Content Security Policy" in fault for fault in tab.faults) >= 3
        assert tab.places == {urlsplit(url).netloc}


def test_a_key_is_asked_for_once_and_kept_in_the_tab(chromium: Browser) -> None:
    with app_serving(ingress(frozenset({"sk-1"}))) as url, chromium.opened(url) as tab:
        tab.until(has("This endpoint takes a key"), SOON_S)
        assert {urlsplit(address).path for address in tab.asked} == {"/"}, "nothing is asked before there is a key"
        assert tab.faults == []
        tab.type("wrong")
        tab.press("Enter")
        tab.until(has("does not take this key"), SOON_S)
        tab.faults.clear()  # of the 401
        tab.type("sk-1")
        tab.press("Enter")
        tab.until(shows(".model", "serving"), SOON_S)
        tab.call("Page.reload")
        tab.until(shows(".model", "serving"), SOON_S)
        assert tab.script("[localStorage.length, document.cookie, location.href]") == [0, "", f"{url}/"]
        tab.script("document.getElementById('forget').click()")
        tab.until(has("This endpoint takes a key"), SOON_S)
        assert not tab.script(has("mac-1"))
        assert tab.script("sessionStorage.length") == 0
        assert not tab.script(has("does not take this key"))
        assert tab.faults == []


def test_a_mac_that_is_lost_is_shown_and_so_is_why_a_model_is_not_served(chromium: Browser) -> None:
    two = replace(MAC, name="mac-2", head=False, facts=replace(MAC.facts or MacFacts("", "", 1, 1, 1, 1), name="mac-2"))
    stages = (StageReport("mac-1", 0, 20, 7, GIB), StageReport("mac-2", 20, 30, 8, GIB))
    links = (LinkReport("mac-1", "mac-2", 1.25e9, 1e-4),)
    whole = replace(SERVES, members=(MAC, two), replicas=(replace(REPORT, stages=stages, links=links),))
    broken = replace(whole, members=(MAC, replace(two, alive=False)), replicas=(), at=1001.0)
    missing = faults.StartError("2 stages need 2 Macs and there is 1.")
    now = {"found": whole, "m": State(running=1)}

    def look() -> RackStatus:
        found = now["found"]
        assert isinstance(found, RackStatus)
        return found

    def states() -> dict[str, State]:
        state = now["m"]
        assert isinstance(state, State)
        return {"m": state, "big": State(f"Error:\n{faults.StartError('big needs 3 GiB more.')}")}

    with app_serving(ingress(look=look, states=states)) as url, chromium.opened(url) as tab:
        tab.until(shows(".model", "m", "serving", "mac-1 0–19", "10 Gb/s", "mac-2 20–29"), SOON_S)
        tab.until(shows(".model", "big", "failed", "big needs 3 GiB more."), SOON_S)
        tab.until(shows("#said", "2 of 2 Macs alive"), SOON_S)
        now |= {"found": broken, "m": State(str(missing), waiting=True)}
        tab.until(shows(".mac.lost", "mac-2", "lost"), SOON_S)
        tab.until(shows(".model", "m", "waiting", "2 stages need 2 Macs"), SOON_S)
        tab.until(shows("#said", "1 of 2 Macs alive, 1 lost"), SOON_S)
        tab.until("document.getElementById('connection').className === 'connection hurt'", SOON_S)
        # Another ingress of the endpoint, which has looked before, answers.
        now["found"] = whole
        tab.until("performance.getEntriesByType('resource').length > 6", SOON_S)
        assert tab.script(shows(".mac.lost", "mac-2", "lost"))
        assert tab.faults == []


def test_an_endpoint_that_is_gone_is_said_to_be_and_comes_back(chromium: Browser) -> None:
    port = ports.free(1)[0]
    with app_serving(ingress(), port) as url:
        opened = chromium.opened(url)
        tab = opened.__enter__()
        tab.until(shows(".model", "serving"), SOON_S)
        assert tab.faults == []
    try:
        tab.until(shows("#said", "The endpoint does not answer. No answer since"), SOON_S)
        assert tab.script("document.querySelector('.facts').classList.contains('stale')"), "old figures look old"
        with app_serving(ingress(look=lambda: replace(SERVES, at=2000.0)), port):
            tab.until(shows("#said", "1 of 1 Macs alive"), SOON_S)
            assert not tab.script("document.querySelector('.facts').classList.contains('stale')")
    finally:
        opened.__exit__(None, None, None)


def test_a_head_that_does_not_answer_is_said_to(chromium: Browser) -> None:
    def look() -> RackStatus:
        raise SettingsError("The rack's head does not answer (gone).")

    with app_serving(ingress(look=look)) as url, chromium.opened(url) as tab:
        tab.until(shows("#said", "The rack's head does not answer (gone)."), SOON_S)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(chromium: Browser, width: int, scheme: str) -> None:
    lost = replace(MAC, name="mac-2", alive=False)
    long = "organisation/a-model-with-a-rather-long-name-of-one-word-0123456789-0123456789-0123456789"
    found = replace(SERVES, members=(MAC, lost), replicas=(replace(REPORT, model=long),), disk="The disk is full.")
    states = {long: State(running=1), "asleep": State(), "lost": State(lost="it was killed")}
    with app_serving(ingress(look=lambda: found, states=lambda: states)) as url, chromium.opened(url) as tab:
        tab.shown_as(width, 844, scheme)
        tab.until(shows(".model", "serving"), SOON_S)
        tab.until(has("The disk is full."), SOON_S)
        assert tab.script("document.documentElement.scrollWidth <= innerWidth")
        assert tab.script(TOO_PALE) == []
        background = tab.script("getComputedStyle(document.body).backgroundColor")
        assert (int(background[4:].split(",")[0]) > 128) == (scheme == "light")
        unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((one) => !one.labels.length).length"
        assert tab.script(unnamed) == 0


def ask(tab: Tab, question: str, **fields: object) -> None:
    """Type it and press Enter. fields: that the request has beside what the page gives it."""
    more = f"JSON.stringify({{...JSON.parse(about.body), ...{json.dumps(fields)}}})"
    tab.script(
        "window.plain ??= window.fetch; window.fetch = (path, about) =>"
        f" window.plain(path, about.body === undefined ? about : {{...about, body: {more}}}); true"
    )
    tab.script("document.getElementById('question').focus()")
    tab.type(question)
    tab.press("Enter")


def test_a_chat_streams_and_is_stopped(chromium: Browser, embedded_server: Server) -> None:
    with chromium.opened(embedded_server.url) as tab:
        tab.until(shows(".model", MODEL, "serving"), SOON_S)
        tab.until(shows(".mac", "127.0.0.1", "alive", "GiB of", "layers 0–29"), SOON_S)
        ask(tab, "What is the capital of France?", temperature=0)
        tab.until(shows(".said.model", "The capital of France is Paris."), ANSWERED_S)
        tab.until("!document.getElementById('send').hidden", ANSWERED_S)
        tab.until(shows(".speed", "tokens/s", "first token after"), SOON_S)
        tab.until("Number(document.querySelectorAll('.plot .now')[1].innerText) > 0", SOON_S)
        ask(tab, "And now?", ignore_eos=True)
        tab.until("document.querySelectorAll('.said.model')[1]?.innerText.length > 3", ANSWERED_S)
        tab.script("document.getElementById('stop').click()")
        tab.until(shows(".speed", "stopped;"), SOON_S)
        tab.until("!document.getElementById('send').hidden", SOON_S)
        tab.until(shows(".model", "running\n0"), ANSWERED_S)
        tab.script("document.getElementById('new').click()")
        assert tab.script("document.getElementById('talk').children.length") == 0
        assert tab.places == {urlsplit(embedded_server.url).netloc}
        assert tab.faults == []
