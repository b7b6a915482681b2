"""A headless Chromium through its debugging pipe (DevTools protocol: NUL-ended JSON), without any package."""
import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page. `with Browser(folder) as browser: browser.open(url); browser.run("document.title")`."""

    def __init__(self, folder: Path, width: int = 900, height: int = 700) -> None:
        ours, theirs = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--remote-debugging-pipe", f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        command = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'  # the numbers that it reads and writes
        self.process = subprocess.Popen(["bash", "-c", command, CHROMIUM, *options, "about:blank"],
                                        pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(ours[0]), os.close(theirs[1])
        self.to, self.of, self.rest = ours[1], theirs[0], b""
        self.number, self.session, self.said = 0, None, []

    def __enter__(self) -> "Browser":
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to), os.close(self.of)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.said.append(answer)

    def read(self) -> dict:
        while b"\0" not in self.rest:
            piece = os.read(self.of, 1 << 20)
            assert piece, "the browser has ended"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    @property
    def complaints(self) -> list[dict]:
        """What the page's console has shown, and exceptions that nobody has caught."""
        return [m["params"] for m in self.said if m.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded",
                                                                      "Runtime.consoleAPICalled")]

    def open(self, url: str) -> None:
        self.said.clear()
        self.call("Page.navigate", url=url)
        while not any(message.get("method") == "Page.loadEventFired" for message in self.said):
            self.said.append(self.read())

    def run(self, script: str):
        """The value of an expression; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> None:
        """Wait for an expression to be true."""
        assert self.run(f"""new Promise(done => {{
            const end = Date.now() + {seconds * 1000};
            const look = () => (({script}) ? done(true) : Date.now() > end ? done(false) : setTimeout(look, 5));
            look(); }})"""), f"never true: {script}; {self.run('document.body.innerText')}"

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
