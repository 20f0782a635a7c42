"""A real Label Studio on loopback: its process, its API, and its front end in a browser."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from trace_opd.tests.pipelines.browser import Browser, wait_for

PROGRAM = Path(os.environ.get("LABEL_STUDIO", ".venv-label-studio/bin/label-studio"))
OWNER, PASSWORD, TOKEN = "anna@example.org", "a-long-password", "0" * 40
_START_S = 600  # the first start migrates an empty database
# The page's text, counted as Label Studio counts: code points, 1 for a line break.
_POINT = """((start, end) => {
  const root = document.querySelector('.trace-opd-segment').closest('div');
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const chars = [];
  for (let node; (node = walker.nextNode());) {
    let at = 0;
    for (const c of node.data) { chars.push([node, at, at + c.length]); at += c.length; }
  }
  const box = (index) => {
    const range = document.createRange();
    range.setStart(chars[index][0], chars[index][1]);
    range.setEnd(chars[index][0], chars[index][2]);
    const rects = [...range.getClientRects()].filter((one) => one.width > 0);
    return rects[0];
  };
  chars[start][0].parentElement.scrollIntoView({ block: 'center' });
  const [a, b] = [box(start), box(end - 1)];
  return [a.left + 0.5, (a.top + a.bottom) / 2, b.right - 0.5, (b.top + b.bottom) / 2];
})"""


class LabelStudio:
    """A server with one user and its token."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Token {TOKEN}"}, timeout=60
        )
        self.owner = self.call("GET", "/api/current-user/whoami")["id"]

    def call(self, method: str, path: str, **more: Any) -> Any:
        reply = self.http.request(method, path, **more)
        assert reply.is_success, f"{method} {path}: {reply.status_code} {reply.text[:2000]}"
        return reply.json() if reply.content else None

    @property
    def version(self) -> str:
        return self.call("GET", "/api/version")["label-studio-os-package"]["version"]

    def add_user(self, email: str) -> int:
        body = {"email": email, "username": email, "password": PASSWORD}
        return self.call("POST", "/api/users/", json=body)["id"]

    def add_project(self, config: str, tasks: list[dict[str, Any]]) -> int:
        """A project with the tasks, in their order; its number."""
        body = {"title": "labels", "label_config": config}
        project = self.call("POST", "/api/projects/", json=body)["id"]
        done = self.call("POST", f"/api/projects/{project}/import", json=tasks)
        assert done["task_count"] == len(tasks), done
        return project

    def tasks(self, project: int) -> dict[str, dict[str, Any]]:
        """The tasks by rollout."""
        query = {"project": project, "fields": "all", "page_size": 100}
        found = self.call("GET", "/api/tasks/", params=query)["tasks"]
        return {task["data"]["rollout_id"]: task for task in found}

    def annotate(self, task: int, result: list[dict], user: int, **more: Any) -> dict[str, Any]:
        body = {"result": result, "completed_by": user, "lead_time": 3.5} | more
        return self.call("POST", f"/api/tasks/{task}/annotations/", json=body)

    def export(self, project: int, kind: str = "JSON") -> bytes:
        path = f"/api/projects/{project}/export"
        reply = self.http.get(path, params={"exportType": kind, "download_all_tasks": "true"})
        assert reply.is_success, reply.text[:2000]
        return reply.content


class Labeller:
    """A person at the front end: logs in, opens a task, marks text with the mouse, submits."""

    def __init__(self, browser: Browser, studio: LabelStudio) -> None:
        self.browser, self.studio = browser, studio
        browser.call("Network.clearBrowserCookies")  # the test before may have logged in
        browser.open(f"{studio.url}/user/login/", ready="input[name=password]")
        browser.js(
            f"document.querySelector('input[name=email]').value = {OWNER!r};"
            f"document.querySelector('input[name=password]').value = {PASSWORD!r};"
            "document.querySelector('form').submit()"
        )
        browser.until("!location.pathname.includes('login') && document.readyState == 'complete'")

    def open_task(self, project: int, task: int) -> None:
        self.task = task
        url = f"{self.studio.url}/projects/{project}/data?task={task}"
        self.browser.open(url, ready=".trace-opd-segment")
        # The page draws the task again while it loads: wait until a node stays for a second.
        while True:
            self.browser.js("window.first = document.querySelector('.trace-opd-segment')")
            time.sleep(1)
            if self.browser.js("Boolean(window.first?.isConnected)"):
                return

    def mark(self, label: str, start: int, end: int) -> None:
        """Choose a label and drag over the characters start … end, in code points."""
        self.browser.press("Escape")  # else the label goes to the mark before
        self.click(_button(".lsf-label", label))
        x, y, to_x, to_y = self.browser.js(f"{_POINT}({start}, {end})")
        self._mouse("mousePressed", x, y)
        self._mouse("mouseMoved", (x + to_x) / 2, (y + to_y) / 2)
        self._mouse("mouseMoved", to_x, to_y)
        self._mouse("mouseReleased", to_x, to_y)

    def choose(self, choice: str) -> None:
        self.click(_button(".lsf-choices *", choice))

    def submit(self) -> None:
        self.click("document.querySelector('[aria-label^=\"Submit\"]')")
        # The page says so before the server has it.
        path = f"/api/tasks/{self.task}/annotations/"
        wait_for(lambda: self.studio.call("GET", path), seconds=60)

    def click(self, node: str) -> None:
        """Click on the node that an expression finds."""
        box = self.browser.js(
            f"(() => {{ const n = {node}; n.scrollIntoView({{block: 'center'}});"
            "const r = n.getBoundingClientRect();"
            "return [(r.left + r.right) / 2, (r.top + r.bottom) / 2]; })()"
        )
        self._mouse("mousePressed", *box)
        self._mouse("mouseReleased", *box)

    def _mouse(self, kind: str, x: float, y: float) -> None:
        buttons = 0 if kind == "mouseReleased" else 1
        self.browser.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons,
            clickCount=1,
        )  # fmt: skip


def _button(selector: str, text: str) -> str:
    """An expression that finds the innermost element whose text begins with a text."""
    return (
        f"[...document.querySelectorAll({selector!r})].findLast(n => n.offsetParent "
        f"&& n.textContent.trim().startsWith({text!r}))"
    )


@contextlib.contextmanager
def running(folder: Path) -> Iterator[LabelStudio]:
    """A server with its database in a folder, while the context is open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
        "COLLECT_ANALYTICS": "false",
        "SENTRY_RATE": "0",
        "FRONTEND_SENTRY_RATE": "0",
        "LATEST_VERSION_CHECK": "false",
    }
    command = [
        str(PROGRAM), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port),
        "--username", OWNER, "--password", PASSWORD, "--user-token", TOKEN,
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _START_S
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not start"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").is_success:
                    break
            time.sleep(0.5)
        yield LabelStudio(url)
    finally:
        server.terminate()
        server.wait(30)
