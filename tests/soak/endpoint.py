"""An OpenAI-compatible server on loopback that fails in every way the soak knows.

What it says is a pure function of the seed and the question; whether it fails, of the round, the
question and how often it was asked. It keeps a log of what it billed.
"""

import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT = 47113  # the same each time: the address is a part of dataset ids and of the journal's keys
USD_PER_MILLION = (3.0, 15.0)  # prompt and completion tokens
MAX_NEW_TOKENS = 64
TIMEOUT_S = 2.0  # annotator.timeout_s
PATIENCE_S = 20.0  # annotator.patience_s
ID = re.compile(rb'"id": ?"soak-([0-9a-f]{16})-')

# How often each failure is drawn, and whether an answer was made for it, which is billed.
FAILURES: dict[str, tuple[int, bool]] = {
    "busy": (4, False),  # 429 with Retry-After in seconds
    "busy until": (1, False),  # 429 with an HTTP date
    "absurd wait": (1, False),  # 429 with a Retry-After beyond all patience
    "error": (3, False),  # 500
    "down": (3, False),  # 503
    "gateway": (1, True),  # 504
    "reset": (3, True),  # in the middle of the body
    "half": (3, True),  # half of the body, then the end
    "stall": (1, True),  # half of the body, then nothing
    "html": (2, False),
    "empty": (1, False),
    "no message": (1, True),
    "redirect": (1, False),  # 307 to another origin
}
# Clean: the answer arrives and must be kept.
CLEAN = {"plain": 6, "drip": 2, "two choices": 1}
_SHARE = (0.4, 0.35, 0.3)  # of failures in the first attempts; then there are none
_CONTENTS = {
    "valid": 12,
    "fenced": 1,
    "abstain": 2,
    "empty": 1,
    "nonsense": 2,
    "cut": 2,
    "refused": 1,
}
_USAGES = ("true", "none", "negative", "float", "text", "huge", "list")


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it. usd: what it billed. clean: a usable answer was sent."""

    key: str
    attempt: int
    how: str
    usd: float
    clean: bool


def question(body: dict[str, Any]) -> str:
    """All that decides an answer."""
    decides = [body["messages"], body.get("max_tokens", body.get("max_completion_tokens"))]
    return sha256(json.dumps(decides).encode()).hexdigest()[:16]


def transport(round_seed: str, key: str, attempt: int, faulty: bool) -> str:
    """How the `attempt`-th request for a question goes: a key of FAILURES or CLEAN."""
    chance = random.Random(f"{round_seed} {key} {attempt}")
    if faulty and attempt < len(_SHARE) and chance.random() < _SHARE[attempt]:
        weights = [weight for weight, _ in FAILURES.values()]
        return chance.choices(list(FAILURES), weights)[0]
    return chance.choices(list(CLEAN), list(CLEAN.values()))[0] if faulty else "plain"


def answer(seed: int, body: dict[str, Any], lies: bool) -> tuple[dict[str, Any], float]:
    """The chat completion, and the US dollars that it is billed at."""
    key = question(body)
    chance = random.Random(f"{seed} {key}")
    limit = body.get("max_tokens", body.get("max_completion_tokens"))
    kind = "valid"
    if len(body["messages"]) == 2 and limit == MAX_NEW_TOKENS:  # no correction, no raised limit
        kind = chance.choices(list(_CONTENTS), list(_CONTENTS.values()))[0]
    message: dict[str, Any] = {"role": "assistant", "content": _content(kind, body, chance)}
    if kind == "refused":
        message |= {"content": None, "refusal": "I cannot help with that."}
    size = sum(len(message["content"].encode()) for message in body["messages"])
    tokens = size // 3, limit if kind == "cut" else chance.randint(10, limit)
    usd = sum(n * price for n, price in zip(tokens, USD_PER_MILLION, strict=True)) / 1e6
    if lies and message["content"] and chance.random() < 0.2:
        message["content"] = [{"type": "text", "text": message["content"]}]
    usage = _usage(chance.choice(_USAGES) if lies else "true", *tokens)
    finish = "length" if kind == "cut" else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"object": "chat.completion", "choices": [choice]} | usage, usd


def _content(kind: str, body: dict[str, Any], chance: random.Random) -> str:
    last = re.findall(r"numbered 0 to (\d+)", body["messages"][-1]["content"])
    segment = chance.randint(0, int(last[-1])) if last else 0
    marks = kind in ("valid", "fenced", "cut")
    spans = [{"segments": [segment], "quote": None}] if marks else []
    text = json.dumps({"abstain": kind == "abstain", "spans": spans, "type": "arithmetic"})
    if kind == "fenced":
        return f"```json\n{text}\n```"
    if kind == "nonsense":
        return 'The mistake is in segment \\u0000, I would say: {"spans": ['
    return text[: len(text) // 2] if kind == "cut" else text


def _usage(kind: str, prompt: int, completion: int) -> dict[str, Any]:
    if kind == "none":
        return {}
    lies = {"negative": -completion, "float": completion + 0.5, "text": str(completion)}
    told: Any = lies.get(kind, completion)
    told = 2**40 if kind == "huge" else [completion] if kind == "list" else told
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": told}}


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
    strangers: list[str] = field(default_factory=list)  # requests that were led to another origin
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, round_seed: str, lies: bool) -> None:
        self.round_seed, self.lies, self.faulty = round_seed, lies, False
        self.log, self.strangers = [], []

    def respond(self, body: dict[str, Any]) -> tuple[str, bytes]:
        """How the response goes, and the completion in it."""
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
        if self.server.server_address[1] != int(self.endpoint.url.rsplit(":")[-1].split("/")[0]):
            self.endpoint.strangers.append(self.path)
            return self._send(200, answer(0, json.loads(raw), False)[0])
        how, content = self.endpoint.respond(json.loads(raw))
        time.sleep(0.005)  # so that a kill finds requests in flight
        waits = {"busy": "0.1", "down": "0", "absurd wait": "99999999"}
        waits["busy until"] = formatdate(time.time() + 1, usegmt=True)
        headers = {"retry-after": waits[how]} if how in waits else {}
        if how == "redirect":
            headers["location"] = f"{self.endpoint.stranger}/chat/completions"
        if how in _STATUS:
            return self._send(_STATUS[how], {"error": {"message": how}}, headers)
        if how == "html":
            return self._send(200, b"<html><body>Bad gateway</body></html>")
        if how == "empty":
            return self._send(200, b"")
        if how not in ("reset", "half", "stall", "drip"):
            return self._send(200, content)
        self._head(200, len(content), {})
        half = len(content) // 2
        pieces = [content[i : i + 40] for i in range(0, len(content), 40)]
        try:
            for piece in pieces if how == "drip" else [content[:half]]:
                self.wfile.write(piece)
                time.sleep(0.01)
            if how == "stall":
                time.sleep(TIMEOUT_S + 1)
        except OSError:  # killed meanwhile
            pass
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = how != "drip"

    def _head(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {"content-type": "application/json", "content-length": str(size)} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self._head(status, len(raw), headers or {})
            self.wfile.write(raw)
        except OSError:  # killed meanwhile
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is none of the server's errors."""


@contextmanager
def serve(seed: int) -> Iterator[Endpoint]:
    """The endpoint, and beside it a stranger to which it redirects."""
    handler = type("Handler", (_Handler,), {})
    try:
        main = _Server(("127.0.0.1", PORT), handler)
    except OSError:  # another soak runs
        main = _Server(("127.0.0.1", 0), handler)
    servers = [main, _Server(("127.0.0.1", 0), handler)]
    url, stranger = (f"http://127.0.0.1:{server.server_address[1]}/v1" for server in servers)
    handler.endpoint = Endpoint(seed, url, stranger)  # type: ignore[attr-defined]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield handler.endpoint  # type: ignore[attr-defined]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
