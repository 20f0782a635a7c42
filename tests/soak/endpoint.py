"""An OpenAI-compatible server on loopback that fails as answers.py decides and logs what it bills.
Started by the soak (run.py).
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trace_opd.tests.soak.answers import (
    CLEAN,
    FAILURES,
    TIMEOUT_S,
    Asked,
    answer,
    question,
    transport,
)

PORT = 47113  # fixed: the address is part of dataset ids and of the journal's keys
_HTML = b"<html><body>502 Bad gateway</body></html>"


@dataclass
class Endpoint:
    """The server's state. Set `round_seed`, `lies` and `faulty` before a run."""

    seed: int
    url: str
    stranger: str
    round_seed: str = ""
    lies: bool = False
    faulty: bool = False
    log: list[Asked] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)  # redirected requests that were followed
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, round_seed: str, lies: bool) -> None:
        self.round_seed, self.lies, self.faulty = round_seed, lies, False
        self.log, self.strangers = [], []

    def respond(self, body: dict[str, Any]) -> tuple[str, bytes]:
        """The outcome of the request, and the completion."""
        key = question(body)
        completion, usd = answer(self.seed, body, self.lies)
        with self.lock:
            attempt = sum(asked.key == key for asked in self.log)
            how = transport(self.round_seed, key, attempt, self.faulty)
            clean = how in CLEAN
            billed = clean or FAILURES[how][1]
            self.log.append(Asked(key, attempt, how, usd if billed else 0.0, clean))
        if how == "two choices":
            completion["choices"] *= 2
        elif how == "no message":
            completion["choices"] = [{"index": 0, "message": None, "finish_reason": "stop"}]
        return how, json.dumps({"id": f"soak-{key}-{attempt}"} | completion).encode()


_STATUS = {"busy": 429, "busy until": 429, "absurd wait": 429, "error": 500, "down": 503}
_STATUS |= {"gateway": 504, "redirect": 307}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    endpoint: Endpoint

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        how, content = self.endpoint.respond(json.loads(raw))
        time.sleep(0.005)  # so that a kill finds requests in flight
        try:
            if how in _STATUS:
                self._refuse(how)
            elif how in ("reset", "half", "stall", "drip"):
                self._in_pieces(how, content)
            else:
                self._send(200, {"html": _HTML, "empty": b""}.get(how, content))
        except OSError:  # the client was killed
            self.close_connection = True

    def _refuse(self, how: str) -> None:
        waits = {"busy": "0.1", "down": "0", "absurd wait": "99999999"}
        waits["busy until"] = formatdate(time.time() + 1, usegmt=True)
        headers = {"retry-after": waits[how]} if how in waits else {}
        if how == "redirect":
            headers["location"] = f"{self.endpoint.stranger}/chat/completions"
        self._send(_STATUS[how], json.dumps({"error": {"message": how}}).encode(), headers)

    def _in_pieces(self, how: str, content: bytes) -> None:
        self.close_connection = how != "drip"
        self._head(200, len(content), {})
        for at in range(0, len(content) if how == "drip" else len(content) // 2, 40):
            self.wfile.write(content[at : at + 40])
            time.sleep(0.01)
        if how == "stall":
            time.sleep(TIMEOUT_S + 1)
        elif how == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(content), headers or {})
        self.wfile.write(content)

    def _head(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {"content-type": "application/json", "content-length": str(size)} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Stranger(BaseHTTPRequestHandler):
    endpoint: Endpoint

    def do_POST(self) -> None:
        self.endpoint.strangers.append(self.path)
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed client is no error of the server."""


@contextmanager
def serve(seed: int) -> Iterator[Endpoint]:
    """The endpoint, and the second server that it redirects to."""
    try:
        main = _Server(("127.0.0.1", PORT), _Handler)
    except OSError:  # another soak is running
        main = _Server(("127.0.0.1", 0), _Handler)
    servers = [main, _Server(("127.0.0.1", 0), _Stranger)]
    url, stranger = (f"http://127.0.0.1:{server.server_address[1]}/v1" for server in servers)
    endpoint = _Handler.endpoint = _Stranger.endpoint = Endpoint(seed, url, stranger)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield endpoint
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
