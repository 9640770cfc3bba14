"""A real headless Chromium that a test drives over its debugging protocol."""

import asyncio
import base64
import itertools
import shutil
import subprocess
import time

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One tab. Use as a context manager; every wait has an end."""

    def __init__(self, profile, width=1500, height=1100):
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},{height}",
                   "about:blank"]  # fmt: skip
        self._profile = profile
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._loop = asyncio.new_event_loop()
        self._ids = itertools.count(1)

    def __enter__(self):
        self._loop.run_until_complete(self._connect())
        return self

    def __exit__(self, *_):
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(20)

    async def _connect(self):
        port = await self._port()
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as reply:
            (tab,) = [target for target in await reply.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=1 << 27)

    async def _port(self):
        told = self._profile / "DevToolsActivePort"
        for _ in range(300):
            if told.exists() and told.read_text().strip():
                return int(told.read_text().split()[0])
            await asyncio.sleep(0.1)
        raise RuntimeError("Chromium did not start")

    def call(self, method, **params):
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method, params):
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json(timeout=60)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def run(self, script):
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def go(self, address):
        """Open an address afresh (one that differs only after the # would not load the page again)."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def text(self):
        """What a person can read."""
        return self.run("document.body ? document.body.innerText : ''") or ""

    def wait(self, *words, seconds=90):
        """Until all words are to be read; the text then."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            text = self.text()
            if all(word in text for word in words):
                return text
            time.sleep(0.3)
        raise AssertionError(f"not shown: {[word for word in words if word not in text]}\n--- shown ---\n{text[:3000]}")

    def click(self, text, kind="a, button, [role=tab], [role=treeitem], li, span"):
        """A real mouse click on the smallest visible element with exactly this text."""
        script = f"""(() => {{
            const found = [...document.querySelectorAll({kind!r})].filter(
                e => e.innerText && e.innerText.trim() === {text!r} && e.getClientRects().length);
            if (!found.length) return null;
            const element = found[found.length - 1];
            element.scrollIntoView({{block: 'center'}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            place = self.run(script)
            if place:
                for action in ("mousePressed", "mouseReleased"):
                    self.call(
                        "Input.dispatchMouseEvent", type=action, x=place[0], y=place[1], button="left", clickCount=1
                    )
                return
            time.sleep(0.3)
        raise AssertionError(f"nothing to click with the text {text!r}\n{self.text()[:3000]}")

    def count(self, selector):
        return self.run(f"document.querySelectorAll({selector!r}).length")

    def wait_for(self, selector, seconds=90):
        """Until an element is there."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.count(selector):
                return
            time.sleep(0.3)
        raise AssertionError(f"no element {selector}\n{self.text()[:3000]}")

    def screenshot(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
