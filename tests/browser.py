"""A real browser at a page: Chromium without a window, driven over a pipe (Chrome DevTools Protocol)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Self

COMMAND = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]


class Browser:
    """One tab. `events` holds what the page did: console messages, exceptions, requests."""

    def __init__(self, profile: Path):
        there, self.writer = os.pipe()
        self.reader, back = os.pipe()  # Chromium reads commands from file 3 and writes to file 4
        line = ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", *COMMAND, f"--user-data-dir={profile}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(line, pass_fds=(there, back), **quiet)  # type: ignore[call-overload]
        os.close(there)
        os.close(back)
        self.waiting, self.last, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.writer)
        os.close(self.reader)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.waiting:
            part = os.read(self.reader, 1 << 20)
            assert part, "the browser is gone"
            self.waiting += part
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        """Show a file, this many pixels wide. A phone's screen has three of its own to each."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 2 if width < 500 else 1, "mobile": width < 500}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Console messages, warnings and exceptions since the page was opened."""
        methods = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [event for event in self.events if event.get("method") in methods]

    def requests(self) -> list[str]:
        """What was asked for since the page was opened; pictures that the page itself holds do not count."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]
