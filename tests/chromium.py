"""A headless Chromium, Debian's where it is installed, driven by its own protocol (CDP) over one WebSocket.

    browser() --> Browser --opened(url)--> Tab: .script(text), .until(text), .asked (addresses), .faults (console)

Every request that a tab makes is noted, whatever becomes of it, and so is whatever its console says of errors.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
START_S, ANSWER_S = 120.0, 60.0
LOOK_S = 0.2
PORT_FILE = "DevToolsActivePort"
"""In which Chromium tells its port and the address of its WebSocket."""


def program() -> str:
    """Path of Chromium. Skips the test where there is none, but not in CI on Linux."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("CI") and sys.platform == "linux":
            pytest.fail("no Chromium here: apt-get install --no-install-recommends chromium-headless-shell")
        pytest.skip("no Chromium here: install chromium-headless-shell")
    return found


def has(text: str) -> str:
    """An expression: whether the page shows the text."""
    return f"document.body.innerText.includes({text!r})"


def shows(selector: str, *texts: str) -> str:
    """An expression: whether one element shows all the texts."""
    found = " && ".join(f"one.innerText.includes({text!r})" for text in texts)
    return f"[...document.querySelectorAll({selector!r})].some((one) => {found})"


class RefusedError(Exception):
    """The browser refuses a command, or a script raises: as in a page that is just being left, or not there yet."""


class Tab:
    """A page that is open.

    Attributes:
        asked: the address of each request that it made, its own first.
        faults: what stands in its console as an error or a warning, and exceptions that nobody caught.
    """

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser, self._session = browser, session
        self.asked: list[str] = []
        self.faults: list[str] = []

    @property
    def places(self) -> set[str]:
        """HOST:PORT of all that was asked for anything."""
        return {urlsplit(address).netloc for address in self.asked if not address.startswith("data:")}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol."""
        return self._browser.call(method, self._session, **parameters)

    def script(self, text: str) -> Any:
        """What the JavaScript expression gives, as JSON. Raises RefusedError."""
        done = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RefusedError(done["exceptionDetails"])
        return done["result"].get("value")

    def until(self, text: str, seconds: float) -> Any:
        """What the expression gives, once that is true; a failure shows what the page says."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                value, refused = self.script(text), None
            except RefusedError as error:
                value, refused = None, error
            if value:
                return value
            assert time.monotonic() < deadline, f"never {text}: {refused or self.text()}, {self.faults}"
            time.sleep(LOOK_S)

    def text(self) -> str:
        """All that can be read."""
        return str(self.script("document.body.innerText"))

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """A key that is no letter: "Enter", "Tab"."""
        code = {"Enter": 13, "Tab": 9}[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r" if key == "Enter" else "", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def shown_as(self, width: int, height: int, scheme: str) -> None:
        """On a screen of so many pixels. scheme: "light" or "dark"."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """A PNG of all of it."""
        path.write_bytes(b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def happened(self, method: str, about: dict[str, Any]) -> None:
        """An event of the protocol."""
        if method == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.faults.append(f"{about['entry']['text']} {about['entry'].get('url', '')}".strip())
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.faults.append(" ".join(str(one.get("value", one.get("description"))) for one in about["args"]))
        elif method == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(about["exceptionDetails"]))


class Browser:
    """The process, and the line to it."""

    def __init__(self, line: ClientConnection) -> None:
        self._line, self._count = line, 0
        self._tabs: dict[str, Tab] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """A command, and its result; raises RefusedError. What happens meanwhile is told to the tabs."""
        self._count += 1
        target = {} if session is None else {"sessionId": session}
        self._line.send(json.dumps({"id": self._count, "method": method, "params": parameters, **target}))
        while True:
            message = json.loads(self._line.recv(ANSWER_S))
            if message.get("id") == self._count:
                if "error" in message:
                    raise RefusedError(method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            if message.get("sessionId") in self._tabs:
                self._tabs[message["sessionId"]].happened(message["method"], message["params"])

    @contextmanager
    def opened(self, url: str) -> Iterator[Tab]:
        """A tab with nothing of another's in it: no cookies, no storage."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Network", "Log", "Runtime", "Page"):
            tab.call(f"{domain}.enable")
        tab.call("Page.navigate", url=url)
        tab.until("document.readyState === 'complete'", ANSWER_S)
        try:
            yield tab
        finally:
            del self._tabs[session]
            self.call("Target.disposeBrowserContext", browserContextId=context)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, which ends with the context."""
    path = program()
    with tempfile.TemporaryDirectory(prefix="pmchromium", ignore_cleanup_errors=True) as folder:
        # No sandbox: as root, and in most containers, Chromium has none. It shows our own page alone.
        line = [path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--no-proxy-server",
                "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        with (Path(folder) / "output").open("wb") as output:
            process = subprocess.Popen(
                line, stdout=output, stderr=output, env=os.environ | {"HOME": folder}, start_new_session=True
            )
        try:
            told, deadline = Path(folder) / PORT_FILE, time.monotonic() + START_S
            while not told.exists() or len(told.read_text().split()) < 2:
                assert process.poll() is None, (Path(folder) / "output").read_text()
                assert time.monotonic() < deadline, (Path(folder) / "output").read_text()
                time.sleep(LOOK_S)
            port, address = told.read_text().split()
            where = f"ws://127.0.0.1:{port}{address}"
            # No pings: their answers wait behind events, which are read when a test asks for something.
            with connect(where, max_size=None, proxy=None, ping_interval=None) as opened:
                yield Browser(opened)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its pages have processes of their own
            process.wait()
