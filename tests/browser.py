"""A headless Chromium that is driven as a reader would: real keys, a real pointer, screenshots.

It speaks the DevTools protocol over two pipes (`--remote-debugging-pipe`): no port, no package.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The browser reads its orders from descriptor 3 and answers on 4.
_STARTER = """
import fcntl, os, sys
orders, answers = (fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3])
os.dup2(orders, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
_KEYS = {
    "Enter": (13, "\r"),
    " ": (32, " "),
    "Tab": (9, ""),
    "Escape": (27, ""),
    "PageUp": (33, ""),
    "PageDown": (34, ""),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}


class Browser:
    """One tab. `console` is what its pages said or threw, `requests` what they asked for."""

    def __init__(self, profile: Path) -> None:
        read_orders, self._orders = os.pipe()
        self._answers, write_answers = os.pipe()
        command = [sys.executable, "-S", "-c", _STARTER, str(read_orders), str(write_answers), str(CHROMIUM)]
        self._process = subprocess.Popen(
            [*command, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_orders, write_answers),
            # Whoever waits for the end of this process's output must not wait for the browser.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_orders)
        os.close(write_answers)
        self._buffer, self._last, self._session = b"", 0, ""
        self._loaded = False
        self.console: list[str] = []
        self.requests: list[str] = []
        (target,) = (one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._session = ""
        try:
            self.send("Browser.close")
            self._process.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)
        os.close(self._orders)
        os.close(self._answers)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """An order of the DevTools protocol, and its answer."""
        self._last += 1
        order: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            order["sessionId"] = self._session
        os.write(self._orders, json.dumps(order).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._last:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    def open(self, page: Path, ready: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show `page` until the expression `ready` is true in it; what was heard before is forgotten."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.console, self.requests, self._loaded = [], [], False
        self.send("Page.navigate", url=page.as_uri())
        self._wait(lambda: self._loaded)
        self._wait(lambda: self.run(ready))

    def run(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str, *, shift: bool = False, ctrl: bool = False) -> None:
        """Press and release a key."""
        code, text = _KEYS[name]
        event: dict[str, Any] = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        event["modifiers"] = 8 * shift + 2 * ctrl
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, text=text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the pointer to the middle of the first element of `selector`, and click there if asked."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center', inline: 'center'}})")
        self.settle()
        box = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"
        )
        x, y = box
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def settle(self) -> None:
        """Until the page has drawn twice: what it put off to its next frame is done."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def picture(self, path: Path, selector: str) -> None:
        """A screenshot of the first element of `selector`, also where it is higher than the window."""
        self.settle()
        clip = self.run(
            f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height, scale: 1}}))"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        answer = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _wait(self, condition: Any) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, f"the page is not ready; it said {self.console}"
            self.send("Runtime.evaluate", expression="new Promise((d) => setTimeout(d, 20))", awaitPromise=True)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], 60)
            assert ready, "the browser does not answer"
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._hear(message.get("method"), message.get("params", {}))
        return message

    def _hear(self, event: str | None, given: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(one.get("value", one.get("description"))) for one in given["args"]))
        elif event == "Runtime.exceptionThrown":
            self.console.append(str(given["exceptionDetails"]))
        elif event == "Log.entryAdded":
            self.console.append(given["entry"]["text"])
