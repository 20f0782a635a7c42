"""A server with vLLM's protocol that answers from a model's own logits, and what is scored."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.scoring.engine import Vocabulary
from trace_opd.schemas.configs import PromptConfig, RoutingConfig
from trace_opd.tests.trace.test_trainer import PROMPT, tables
from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.routed import routed_table
from trace_opd.trace.sequences import TrainingSequence, training_sequences

Reply = tuple[int, Any]  # status, body: JSON's value, or bytes


@pytest.fixture(scope="session")
def micro() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


@pytest.fixture(scope="session")
def vocabulary(micro: Policy) -> Vocabulary:
    size = micro.model.config.vocab_size
    return Vocabulary(micro.tokenizer, micro.info.vocab_fingerprint, size)


@pytest.fixture(scope="session")
def sequences(micro: Policy) -> list[TrainingSequence]:
    """Responses at temperature 0.9 with routed tokens, right and wrong ones."""
    made = tables()
    config = RoutingConfig(alpha=0.6, error=RoutingConfig().key)
    routed = routed_table(
        made.problems, made.rollouts, made.verdicts, made.annotations,
        byte_table(micro.tokenizer), config,
    )  # fmt: skip
    found = training_sequences(routed, micro.tokenizer, PromptConfig(**PROMPT.model_dump()))
    return [one for one in found if one.routed_end]


class Served:
    """vLLM's /v1/completions with prompt_logprobs. answer: what each request gets, by its number
    and body; `honest` by default. cap: the server's --max-logprobs."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.cap = 64
        self.answer: Callable[[int, dict], Reply] = lambda number, body: self.honest(body)
        self.requests: list[dict] = []
        self.paths: set[str] = set()
        self.keys: set[str | None] = set()
        self.most_in_flight = self._in_flight = 0
        self.url = ""
        self._lock = threading.Lock()

    def respond(self, path: str, key: str | None, body: dict) -> Reply:
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.paths.add(path)
            self.keys.add(key)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return self.answer(number, body)
        finally:
            with self._lock:
                self._in_flight -= 1

    @torch.no_grad()
    def honest(self, body: dict) -> Reply:
        """As vLLM: the raw logits' log-softmax; per token the k likeliest and the token itself."""
        k, ids = body["prompt_logprobs"], body["prompt"]
        if k > self.cap:
            text = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}"
            )
            return 400, {"error": {"message": text, "type": "BadRequestError", "code": 400}}
        logprobs = self._policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[Any] = [None]
        for token, row in zip(ids[1:], logprobs[:-1], strict=True):
            top = row.topk(k)
            rank = int((row >= row[token]).sum())
            entry = {str(token): self._one(token, float(row[token]), rank)}
            for at, (value, other) in enumerate(zip(*map(torch.Tensor.tolist, top), strict=True)):
                entry[str(other)] = self._one(other, value, at + 1)
            entries.append(entry)
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}
        return 200, {"id": "x", "object": "text_completion", "model": "m", "choices": [choice]}

    def _one(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        text = self._policy.tokenizer.decode([token])
        return {"logprob": max(logprob, -9999.0), "rank": rank, "decoded_token": text}


@contextmanager
def _serving(state: Served) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            status, reply = state.respond(
                self.path, self.headers.get("authorization"), json.loads(raw)
            )
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def served(micro: Policy) -> Iterator[Served]:
    state = Served(micro)
    with _serving(state):
        yield state


@pytest.fixture
def second(micro: Policy) -> Iterator[Served]:
    """Another server of the same model."""
    state = Served(micro)
    with _serving(state):
        yield state
