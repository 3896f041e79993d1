"""Headless Chromium by the WebDriver protocol, for tests and for the screenshots in records/."""
import base64
import json
import shutil
import subprocess
import time
import urllib.request


class Browser:
    """Chromium behind chromedriver: profile is an empty directory, size that of the window."""

    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
    ]

    def __init__(self, profile, size=(400, 800)):
        command = [shutil.which("chromedriver"), "--port=0"]
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started = next(line for line in self.driver.stdout if "successfully" in line)
        port = started.rstrip(". \n").split()[-1]
        self.base = f"http://127.0.0.1:{port}/session"
        flags = [*self.flags, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]
        wanted = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("", {"capabilities": {"alwaysMatch": wanted}})
        self.base += "/" + session["sessionId"]

    def call(self, path, body, method="POST"):
        """A WebDriver command's value."""
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode() if method != "GET" else None
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def go(self, url):
        self.call("/url", {"url": url})

    def run(self, script):
        """The value of a JavaScript expression."""
        return self.call("/execute/sync", {"script": "return " + script, "args": []})

    def wait(self, script):
        """The script's value, once it is true."""
        deadline = time.monotonic() + 20
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, (script, self.run("document.body.innerText"))
            time.sleep(0.05)
        return value

    def press(self, key):
        action = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": action}]})

    def emulate(self, scheme, size):
        """A "light" or "dark" color scheme, and a width and height in pixels."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", {"features": features})
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def devtools(self, command, params):
        return self.call("/goog/cdp/execute", {"cmd": command, "params": params})

    def screenshot(self):
        """What the window shows, as the bytes of a PNG."""
        return base64.b64decode(self.call("/screenshot", None, "GET"))

    def errors(self):
        log = self.call("/se/log", {"type": "browser"})
        return [entry for entry in log if entry["level"] == "SEVERE"]

    def close(self):
        self.call("", {}, "DELETE")
        self.driver.terminate()
        self.driver.wait()
