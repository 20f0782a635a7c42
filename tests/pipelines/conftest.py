"""Fixtures of the pipelines' tests: a loopback server with OpenAI's chat, files and batch
interfaces, and a store to annotate.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from trace_opd.data.store import Store
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.tests.pipelines.browser import CHROMIUM, Browser

GRADE = '{"reason": "It holds.", "grade": 5}'
VALID = '{"abstain": false, "spans": [{"segments": [1], "quote": null}], "type": "setup"}'
Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def completion(body: dict[str, Any], content: str | None = None) -> tuple[int, dict[str, Any]]:
    """A chat completion; a prompt token per four characters, ten for the answer.

    content: None: what an annotator or a judge may answer.
    """
    schema = body.get("response_format", {}).get("json_schema", {})
    content = content or (GRADE if schema.get("name") == "grade" else VALID)
    asked = sum(len(message["content"]) for message in body["messages"])
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": asked // 4, "completion_tokens": 10}
    return 200, {"choices": [choice], "usage": usage}


class PaidServer:
    """The server's state and its script.

    answer: (request body) -> (status, response body). asked: number of requests of any kind.
    polls: how often a batch must be polled before it is final. final: the batch's status then; in
    an expired or cancelled batch every second request has an answer.
    """

    def __init__(self) -> None:
        self.answer: Answer = completion
        self.chats: list[dict[str, Any]] = []
        self.uploads = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.answered: list[dict[str, Any]] = []  # bodies that got a completion, by chat or batch
        self.polls, self.final, self.fault = 1, "completed", "no reason"
        self.polled = self.asked = 0
        self.authorization: set[str | None] = set()
        self.url = ""
        self.lock = threading.Lock()

    def respond(self, method: str, path: str, raw: bytes, content_type: str) -> tuple[int, Any]:
        with self.lock:
            self.asked += 1
            match method, path.split("?")[0].removeprefix("/v1").strip("/").split("/"):
                case "POST", ["chat", "completions"]:
                    return self._chat(json.loads(raw))
                case "POST", ["files"]:
                    self.uploads += 1
                    return 200, self._file(_uploaded(raw, content_type))
                case "GET", ["files", name, "content"]:
                    return 200, self.files[name]
                case "POST", ["batches"]:
                    return 200, self._create(json.loads(raw))
                case "GET", ["batches"]:
                    data = list(self.batches.values())
                    return 200, {"object": "list", "data": data, "has_more": False}
                case "GET", ["batches", name]:
                    return 200, self._poll(self.batches[name])
                case "POST", ["batches", name, "cancel"]:
                    batch = self.batches[name]
                    batch["status"] = "cancelling"
                    return 200, batch
        return 404, {"error": {"message": f"no {path}"}}

    def _chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.chats.append(body)
        status, reply = self.answer(body)
        if status == 200:
            self.answered.append(body)
        return status, reply

    def _file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        about = {"bytes": len(content), "created_at": int(time.time()), "filename": name}
        return {"id": name, "object": "file", "purpose": "batch", "status": "processed", **about}

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        lines = self.files[asked["input_file_id"]].splitlines()
        batch = {
            **asked,
            "id": f"batch-{len(self.batches)}",
            "object": "batch",
            "created_at": int(time.time()),
            "status": "validating",
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "polls": 0,
        }
        self.batches[batch["id"]] = batch
        return batch

    def _poll(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.polled += 1
        if batch["status"] == "cancelling":
            self._end(batch, "cancelled")
        elif batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            batch["polls"] += 1
            if batch["polls"] > self.polls:
                self._end(batch, self.final)
        return batch

    def _end(self, batch: dict[str, Any], status: str) -> None:
        batch["status"] = status
        batch[f"{status}_at"] = batch["created_at"] + 60
        if status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "x", "message": self.fault}]}
            return
        lines = self.files[batch["input_file_id"]].splitlines()
        good, bad = [], []
        for line in lines if status == "completed" else lines[::2]:
            request = json.loads(line)
            code, reply = self.answer(request["body"])
            outcome = {"custom_id": request["custom_id"], "error": None}
            outcome["response"] = {"status_code": code, "request_id": "r", "body": reply}
            (good if code == 200 else bad).append(json.dumps(outcome).encode())
            if code == 200:
                self.answered.append(request["body"])
        for name, outcomes in (("output_file_id", good), ("error_file_id", bad)):
            if outcomes:
                batch[name] = self._file(b"\n".join(outcomes) + b"\n")["id"]
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}


def _uploaded(raw: bytes, content_type: str) -> bytes:
    """The file in a multipart form."""
    boundary = b"--" + content_type.split("boundary=")[1].encode()
    for part in raw.split(boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if re.search(rb'name="file"', head):
            return content.removesuffix(b"\r\n")
    raise AssertionError("no file in the form")


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def paid_server() -> Iterator[PaidServer]:
    state = PaidServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            state.authorization.add(self.headers.get("authorization"))
            kind = self.headers.get("content-type", "")
            status, reply = state.respond(self.command, self.path, raw, kind)
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _serve

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def make_verdicts() -> Callable[..., Store]:
    """Makes a store with a verdicts dataset: `parts` parts of `count` wrong rollouts, with
    `distinct` responses in all; None: each has its own. All problems have the same text."""

    def make(
        root: Path, parts: int, count: int, unscored: int = 0, distinct: int | None = None
    ) -> Store:
        store = Store(root)
        drafts = {}
        inputs: dict[str, Any] = {}
        for contract in (PROBLEMS, ROLLOUTS, VERDICTS):
            draft = store.begin(contract.name, {"made": "here"}, inputs, contract)
            for part in range(parts):
                rows = _rows(part, count, unscored, distinct)[contract.name]
                draft.write_part(part, contract.table(rows))
            drafts[contract.name] = draft.finish(parts)
            inputs = {contract.name: drafts[contract.name]}
        store.set_alias("verdicts", drafts["verdicts"])
        return store

    return make


def _rows(
    part: int, count: int, unscored: int, distinct: int | None
) -> dict[str, list[dict[str, Any]]]:
    problem = {
        "problem_id": f"p{part}", "problem": "3 boxes of 4 pens?", "answer": "12",
        "answer_kind": "math", "solution": None, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip
    rollout = {
        "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": "stop",
        "policy_name": "test", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "on_policy": False,
    }  # fmt: skip
    verdict = {"parsed_answer": "7", "status": "ok", "verifier": "test", "seconds": 0.0}
    rollouts, verdicts = [], []
    for index in range(count):
        ids = {"rollout_id": f"r{part}-{index}", "problem_id": f"p{part}", "group_id": f"g{part}"}
        number = (part * count + index) % (distinct or 10**9)
        response = f"Boxes: 3.\nPens: {number}.\nSo 3 + 4 = 7."
        rollouts.append(
            rollout | ids | {"sample_index": index, "seed": index, "response": response}
        )
        scored = index < count - unscored
        score = {"reward": 0.0, "correct": False} if scored else {"reward": None, "correct": None}
        verdicts.append(verdict | ids | score)
    return {"problems": [problem], "rollouts": rollouts, "verdicts": verdicts}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes own.py, code of a user, into the folder in which the test then runs."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("own.py").write_text(dedent(text))
