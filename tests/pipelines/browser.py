"""A headless Chromium for the tests of pages; conftest.py has one for the session."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
# Texts, tables and pictures that are wider than their place, outside of what scrolls.
TOO_WIDE = """[...document.querySelectorAll('body, body *')]
  .filter((node) => node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0
    && node.checkVisibility()
    && ['block', 'grid', 'flex', 'table-cell'].includes(getComputedStyle(node).display)
    && !node.closest('#list, pre, .problem, dialog'))
  .map((node) => node.tagName + '.' + node.className)"""


class Browser:
    """A headless Chromium with one page, driven over its debugging protocol."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--remote-debugging-port=0",
            "--window-size=1400,900",
        ]
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port_file = profile / "DevToolsActivePort"
        wait_for(lambda: port_file.exists() and port_file.read_text().count("\n") == 1)
        port = port_file.read_text().splitlines()[0]
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
        (page,) = [page for page in pages if page["type"] == "page"]
        self.connection = connect(page["webSocketDebuggerUrl"], max_size=None)
        self.calls = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters}
        self.connection.send(json.dumps(message))
        while True:
            answer = json.loads(self.connection.recv(timeout=30))
            if answer.get("id") == self.calls:
                return answer["result"]

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open(self, url: str, ready: str = "#detail .response") -> None:
        """Load a page and wait until it has an element; a report's shows a rollout."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.until(f"document.querySelector('{ready}') !== null")

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def too_wide(self, width: int) -> list[str]:
        """What does not fit into a window of this width."""
        self.resize(width)
        found = self.js(TOO_WIDE)
        if self.js("document.documentElement.scrollWidth > innerWidth"):
            found.append("the page")
        self.resize(1400)
        return found

    def until(self, expression: str) -> None:
        wait_for(lambda: self.js(expression))

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        if key == "Escape":
            text = {"windowsVirtualKeyCode": 27}  # dialogs close by the code, not by the name
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.wait(timeout=30)


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
