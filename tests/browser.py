# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium to look at pages of this machine with, over the few WebDriver commands that a test needs."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses to run as root with it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no other machine, as everywhere in the tests
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id, by the WebDriver standard


class Browser:
    """A window of Chromium, closed at the end of `with`.

    Args:
        profile: An empty folder.
        size: Width and height of the window.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 1200)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "HOME": str(profile)}
        self._driver = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        self._base = f"http://127.0.0.1:{port}"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        switches = [*SWITCHES, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]
        options = {"binary": CHROMIUM, "args": switches}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self.until(lambda: self._ask("GET", "/status")["ready"], seconds=60)
            session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._driver.kill()
            raise
        self._base += f"/session/{session['sessionId']}"

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=30)

    def _ask(self, method: str, path: str, body: dict | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with self._open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error

    def until(self, condition, seconds: float = 60.0) -> Any:
        """Wait until `condition()` is true, and return what it gave."""
        end = time.monotonic() + seconds
        while True:
            try:
                if value := condition():
                    return value
                reason = "it is still false"
            except (OSError, RuntimeError) as error:  # not there yet
                reason = error
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds} s: {reason}")
            time.sleep(0.1)

    def go(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a piece of JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def _element(self, selector: str) -> str:
        return self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def has(self, selector: str) -> bool:
        return self.run("return document.querySelector(arguments[0]) !== null", selector)

    def text(self, selector: str) -> str:
        """Visible text, with single spaces."""
        return re.sub(r"\s+", " ", self.run("return document.querySelector(arguments[0]).innerText", selector)).strip()

    def click(self, selector: str) -> None:
        """Click as a hand does: it waits while the element is missing, hidden or covered."""

        def try_it() -> bool:
            self._ask("POST", f"/element/{self._element(selector)}/click")
            return True

        self.until(try_it)

    def type(self, selector: str, text: str, clear: bool = True) -> None:
        """Type into a field, or name the file of a file field."""
        element = self.until(lambda: self._element(selector))
        if clear:
            self._ask("POST", f"/element/{element}/clear")
        self._ask("POST", f"/element/{element}/value", {"text": text})

    def errors(self) -> list[str]:
        """What the console has complained about since it was last asked."""
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))
