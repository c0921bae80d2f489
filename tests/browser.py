"""A headless Chromium, over its debugging pipe: what a page does when a person opens it."""

import json
import os
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. `events` are what the browser has told so far; use it in a `with`."""

    def __init__(self, folder):
        ours, theirs = os.pipe(), os.pipe()  # commands to the browser, and what it says
        flags = "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe about:blank".split()
        start = [CHROMIUM, *flags, f"--user-data-dir={folder}"]
        shell = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'  # where it looks for the pipe
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *start], pass_fds=(ours[0], theirs[1]), stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.to = os.fdopen(ours[1], "wb", buffering=0)
        self.said = os.fdopen(theirs[0], "rb")
        self.events = []
        self.count = 0
        self.session = None
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self(f"{part}.enable")

    def __call__(self, method, **parameters):
        """Ask, and wait for the answer."""
        self.count += 1
        asked = {"id": self.count, "method": method, "params": parameters}
        self.to.write(json.dumps(asked | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == asked["id"]:
                assert "error" not in told, told
                return told["result"]

    def _next(self):
        heard = bytearray()
        while (byte := self.said.read(1)) != b"\0":
            assert byte, "the browser has gone"
            heard += byte
        told = json.loads(heard)
        if "method" in told:
            self.events.append(told)
        return told

    def open(self, path):
        """Load a local file, and wait until it is loaded."""
        self("Page.navigate", url=f"file://{path}")
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def value(self, expression):
        """What a JavaScript expression is, as JSON."""
        found = self("Runtime.evaluate", expression=f"JSON.stringify({expression})", returnByValue=True)
        assert "exceptionDetails" not in found, found
        return json.loads(found["result"]["value"])

    def wait_for_frames(self):
        """Wait until what was asked for is laid out and drawn: two frames."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self("Runtime.evaluate", expression=f"{frames}.then(() => 1)", awaitPromise=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.to.close()
        self.said.close()
