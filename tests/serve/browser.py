"""A page in headless Chromium, driven over its debugging pipe."""

import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --window-size=900,700"


class Page:
    """One page. `run` evaluates JavaScript in it, `wait` until that is true."""

    def __init__(self, url, folder, *, dark=False):
        hears, self._says = os.pipe()
        self._hears, says = os.pipe()
        scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f"exec {CHROMIUM} {OPTIONS} {scheme} --user-data-dir={folder} 3<&{hears} 4>&{says}",
            ],
            pass_fds=(hears, says),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(hears)
        os.close(says)
        self._held, self._number, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url=url)["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._says, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                part = os.read(self._hears, 1 << 16)
                assert part, "Chromium has ended"
                self._held += part
            text, _, self._held = self._held.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script, timeout_s=60):
        end = time.monotonic() + timeout_s
        while not self.run(script):
            assert time.monotonic() < end, f"never: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.05)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press_enter(self):
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def picture(self):
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._says)
        os.close(self._hears)
