"""Misbehaving servers against every client of endpoints: annotator, judge, sampler, batch client.

Each client fails with one sentence that names the endpoint, in bounded time and memory, and sends
nothing to another address.
"""

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.pipelines import endpoint, transport
from trace_opd.pipelines.annotators import open_annotator
from trace_opd.pipelines.annotators.batch_client import BatchClient
from trace_opd.pipelines.annotators.batch_jobs import Job, JobFile
from trace_opd.pipelines.endpoint import refill_s, seconds_asked
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.pipelines.samplers.vllm_servers import VllmServersSampler
from trace_opd.pipelines.verifiers.registry import open_verifier
from trace_opd.schemas.configs import (
    OpenAIAnnotator,
    OpenAISampler,
    SamplingConfig,
    SegmentConfig,
    VerifyConfig,
)
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.protocols import Prompt

Answer = Callable[[socket.socket], None]
KEY = "sk-planted-0123456789"
BIG = 1 << 20  # the size limit in these tests


class Server:
    """requests: (head, body) of each request received."""

    def __init__(self) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        self.url = ""
        self.ended = threading.Event()


@contextmanager
def serving(answer: Callable[[socket.socket, Server], None]) -> Iterator[Server]:
    """A server on loopback that handles every connection with `answer`."""
    server = Server()
    listening = socket.create_server(("127.0.0.1", 0))

    def connection(line: socket.socket) -> None:
        with line, suppress(OSError):  # the client may close the connection
            raw = b""
            while b"\r\n\r\n" not in raw:
                raw += line.recv(65536)
            head, body = raw.split(b"\r\n\r\n", 1)
            length = [v for n, v in fields(head) if n == b"content-length"]
            while length and len(body) < int(length[0]):
                body += line.recv(65536)
            server.requests.append((head, body))
            answer(line, server)

    def accepting() -> None:
        with suppress(OSError):
            while True:
                line, _ = listening.accept()
                threading.Thread(target=connection, args=(line,), daemon=True).start()

    threading.Thread(target=accepting, daemon=True).start()
    server.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    try:
        yield server
    finally:
        server.ended.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def fields(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
    return [(name.lower(), value.strip()) for name, _, value in lines]


def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    """A complete response; headers: lines that end with CRLF."""
    head = f"HTTP/1.1 {status}\r\n{headers}content-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body


def sends(raw: bytes) -> Callable[[socket.socket, Server], None]:
    return lambda line, server: line.sendall(raw)


def repeats(start: bytes, piece: bytes, pause_s: float = 0.0) -> Any:
    """Sends a start, then pieces until the client closes the connection or the test ends."""

    def answer(line: socket.socket, server: Server) -> None:
        line.sendall(start)
        while not server.ended.wait(pause_s):
            line.sendall(piece)

    return answer


# --- the clients ---


def annotate(url: str, timeout_s: float = 3.0, **changes: Any) -> Any:
    config = OpenAIAnnotator(
        **{"engine": "openai", "base_url": url, "model": "m", "api_key_env": None}
        | {"timeout_s": timeout_s, "max_attempts": 1}
        | changes
    )
    annotator = open_annotator(config, SegmentConfig())
    try:
        return annotator.annotate(*tables())
    finally:
        annotator.close()


def grade(url: str, timeout_s: float = 3.0, **changes: Any) -> Any:
    part = {"name": "judge", "base_url": url, "model": "m", "api_key_env": None}
    part |= {"timeout_s": timeout_s, "max_attempts": 1} | changes
    verifier = open_verifier(VerifyConfig.model_validate({"rewards": [part]}))
    try:
        return verifier.verify(*tables()[:2])
    finally:
        verifier.close()


def sample(url: str, timeout_s: float = 3.0, **changes: Any) -> Any:
    config = OpenAISampler(engine="openai", base_url=url, timeout_s=timeout_s, **changes)
    prompt = Prompt([{"role": "user", "content": "Name three colours."}])
    return OpenAIPolicySampler(config, "m").sample([prompt], SamplingConfig(), [[1]])


def refresh(url: str, timeout_s: float = 3.0, api_key_env: str | None = None) -> Any:
    """A batch's state, fetched by the synchronous client."""
    job = Job(
        base_url=url, api_key_env=None, requests=1, worst_case_usd=0.0, refused=[],
        created_at="now", batch_id="batch-0",
    )  # fmt: skip
    client = BatchClient(url, api_key_env, 1, timeout_s, timeout_s)
    try:
        return client.refresh(JobFile(Path("/nowhere/job.json"), job))
    finally:
        client.close()


def tables() -> tuple[Any, Any, Any]:
    problem = {
        "problem_id": "p", "problem": "3 boxes of 4 pens?", "answer": "12", "answer_kind": "math",
        "solution": None, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip
    ids = {"rollout_id": "r", "problem_id": "p", "group_id": "g"}
    rollout = ids | {
        "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": "stop",
        "policy_name": "test", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "on_policy": False,
        "sample_index": 0, "seed": 0, "response": "So 3 + 4 = 7.",
    }  # fmt: skip
    verdict = ids | {
        "parsed_answer": "7", "status": "ok", "verifier": "test", "seconds": 0.0,
        "reward": 0.0, "correct": False,
    }  # fmt: skip
    return PROBLEMS.table([problem]), ROLLOUTS.table([rollout]), VERDICTS.table([verdict])


CLIENTS = pytest.mark.parametrize("ask", [annotate, grade, sample, refresh])


def refusal(ask: Callable[..., Any], server: Server, **changes: Any) -> str:
    """The sentence with which a client fails."""
    with pytest.raises(InputError) as raised:
        ask(server.url, **changes)
    message = str(raised.value)
    assert server.url in message
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries back off for longer than any client's patience, so each client makes one attempt."""
    monkeypatch.setattr(endpoint, "_backoff", lambda state: 100.0)


# --- redirects, proxies, keys ---


@CLIENTS
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(ask, status):
    with serving(sends(http(b"{}"))) as stranger:
        where = f"location: {stranger.url}/chat/completions\r\n"
        with serving(sends(http(b"", f"{status} Elsewhere", where))) as server:
            message = refusal(ask, server, timeout_s=5.0)
    assert stranger.requests == []
    assert len(server.requests) == 1  # a second attempt would be redirected too
    assert "Redirected" in message
    assert "set base_url to the endpoint itself" in message


@CLIENTS
def test_a_proxy_of_the_environment_does_not_read_the_key_and_the_prompts(ask, monkeypatch):
    with serving(sends(http(b"{}"))) as proxy, serving(sends(http(b"<html>"))) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        refusal(ask, server)
    assert proxy.requests == []
    assert server.requests


def test_an_https_endpoint_is_reached_through_the_proxy_by_a_tunnel(monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", KEY)
    with serving(sends(http(b"", "503 No"))) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.removesuffix("/v1"))
        with pytest.raises(InputError):
            annotate("https://endpoint.invalid/v1", api_key_env="PLANTED_KEY")
        monkeypatch.setenv("no_proxy", "endpoint.invalid")
        with pytest.raises(InputError):
            annotate("https://endpoint.invalid/v1", api_key_env="PLANTED_KEY")
    ((head, body),) = proxy.requests
    assert head.startswith(b"CONNECT endpoint.invalid:443")
    assert KEY.encode() not in head + body


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_one_sentence(proxy, monkeypatch):
    monkeypatch.setenv("all_proxy", proxy)
    for client in (transport.async_client, transport.sync_client):
        with pytest.raises(InputError, match=r"https://endpoint\.invalid/v1: the proxy of HTTPS_"):
            client("https://endpoint.invalid/v1", None, 1.0)


@CLIENTS
def test_only_the_configs_key_is_sent(ask, monkeypatch):
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nX-Key: {KEY}")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    monkeypatch.setenv("PLANTED_KEY", "for-this-one-alone")
    with serving(sends(http(b"<html>"))) as server:
        refusal(ask, server)
        refusal(ask, server, api_key_env="PLANTED_KEY")
    first, last = dict(fields(server.requests[0][0])), dict(fields(server.requests[-1][0]))
    assert b"authorization" not in first
    assert last[b"authorization"] == b"Bearer for-this-one-alone"
    assert all(KEY.encode() not in head for head, _ in server.requests)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1"])
def test_a_plain_http_endpoint_needs_no_proxy_that_works(proxy, monkeypatch):
    monkeypatch.setenv("all_proxy", proxy)
    with serving(sends(http(b"<html>"))) as server:
        refusal(annotate, server)
    assert server.requests


def test_a_key_that_fits_no_header_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", f"{KEY}\n")
    with serving(sends(http(b"{}"))) as server:
        assert KEY not in refusal(annotate, server, api_key_env="PLANTED_KEY")
    assert server.requests == []


# --- the size of an answer ---

CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
CHUNK = b"10000\r\n" + b" " * 65536 + b"\r\n"
ZEROS = gzip.compress(b" " * (20 * BIG))
GZIP = "content-encoding: gzip\r\n"


@CLIENTS
@pytest.mark.parametrize(
    "answer",
    [
        sends(http(ZEROS, headers=GZIP)),
        sends(http(gzip.compress(ZEROS), headers="content-encoding: gzip, gzip\r\n")),
        sends(http(ZEROS, "500 Oops", GZIP)),
        sends(http(b" " * (2 * BIG))),
        repeats(CHUNKED + b"\r\n", CHUNK),
        # Bytes after the end of a gzip stream: the decoder returns none of them.
        repeats(
            CHUNKED + GZIP.encode() + b"\r\n14\r\n" + gzip.compress(b"", 1, mtime=0) + b"\r\n",
            CHUNK,
        ),
    ],
    ids=["gzip", "gzip twice", "gzip of an error", "plain", "endless", "endless after gzip"],
)
def test_an_answer_above_the_limit_is_not_taken(ask, answer, monkeypatch):
    monkeypatch.setattr(transport, "MOST_BYTES", BIG)
    with serving(answer) as server:
        assert "more than 1 MiB" in refusal(ask, server)


@CLIENTS
@pytest.mark.parametrize(
    "answer",
    [
        repeats(b"", b""),
        repeats(http(b"{}")[:-40], b"", 0.05),
        repeats(CHUNKED + b"\r\n", b"1\r\n \r\n", 0.05),
        repeats(CHUNKED, b"x-more: 1\r\n", 0.05),
        repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    ],
    ids=["silent", "head without an end", "body drips", "headers drip", "continues without end"],
)
def test_an_answer_that_does_not_end_is_given_up_at_the_deadline(ask, answer):
    with serving(answer) as server:
        assert "timed out" in refusal(ask, server, timeout_s=0.3)


@CLIENTS
def test_endless_headers_are_refused(ask):
    with serving(repeats(CHUNKED, b"x-more: " + b"1" * 60_000 + b"\r\n")) as server:
        refusal(ask, server)


# --- the content of an answer ---

BODIES = {
    "html": b"<html><body>Please log in</body></html>",
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "number": b"NaN",
    "deep": b"[" * 10_000,
    "deep and closed": b'{"choices": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "nearly too deep": b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}",
    "no choices": b'{"choices": []}',
    "choices null": b'{"choices": null}',
    "message null": b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
    "content of numbers": b'{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}',
    "not utf-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "half": b'{"choices": [{"message": {"con',
    "long number": b'{"choices": ' + b"9" * 10_000 + b"}",
}


@CLIENTS
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_not_what_was_asked_for_is_one_sentence(ask, body):
    with serving(sends(http(body))) as server:
        message = refusal(ask, server)
    assert "NotACompletion" in message


@CLIENTS
@pytest.mark.parametrize("status", [400, 404, 429, 500])
@pytest.mark.parametrize(
    "body", [*(BODIES[name] for name in ("html", "null", "deep", "nearly too deep")),
              b'{"error": "busy"}',
              b'{"error": {"message": {}, "code": [], "param": {}, "type": 1}}'],
)  # fmt: skip
def test_an_error_with_any_body_is_one_sentence(ask, status, body):
    with serving(sends(http(body, f"{status} Oops"))) as server:
        refusal(ask, server)


@CLIENTS
@pytest.mark.parametrize(
    "raw",
    [
        http(b"plain", headers=GZIP),
        http(gzip.compress(b"{}")[:-5], headers=GZIP),
        http(b"{}", headers="content-encoding: " + "gzip, " * 50 + "gzip\r\n"),
        http(b"{}").replace(b"length: 2", b"length: 90"),
        http(b"{}").replace(b"length: 2", b"length: -1"),
        http(b"{}", "999 Odd"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\0" * 4096,
    ],
)
def test_an_answer_that_is_no_http_is_one_sentence(ask, raw):
    with serving(sends(raw)) as server:
        refusal(ask, server)


ERRORS = [
    b"",
    b"busy",
    b"[]",
    b'{"error": "busy"}',
    b'{"message": "busy", "code": 7}',
    b'{"error": {"message": "no", "code": "c", "param": "temperature", "type": "t"}}',
    b'{"error": {"message": {}, "code": [], "param": {}, "type": 1}}',
]


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 503])
def test_a_failed_request_raises_what_the_openai_client_raises(status):
    async def raised(client: Any, *body: Any, **options: Any) -> tuple[Any, ...]:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.post(*body, **options)
        await client.close()
        error = caught.value
        return type(error), str(error), error.status_code, error.code, error.param, error.type

    async def both(url: str) -> tuple[Any, Any]:
        ours = transport.ChatClient(url, None, 3.0)
        theirs = transport.async_client(url, None, 3.0)
        path = "/chat/completions"
        return await raised(ours, b"{}"), await raised(theirs, path, cast_to=object, body={})

    for body in ERRORS:
        with serving(sends(http(body, f"{status} Oops"))) as server:
            ours, theirs = asyncio.run(both(server.url))
        assert ours == theirs


# --- the wait that a server asks for ---

RETRY_AFTER = [
    "99999999", "1e9", "-5", "NaN", "inf", "9" * 400, "0x10", " ",
    "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 -9999",
    "Mon, 01 Jan 0001 00:00:00 +2359", "Wed, 21 Oct 2015 07:28:00 +99999999999999",
    "Wed, 99 Foo 2015 99:99:99 ABC",
]  # fmt: skip


@CLIENTS
@pytest.mark.parametrize("value", RETRY_AFTER)
def test_no_wait_is_longer_than_the_config_allows(ask, value, monkeypatch):
    if ask is annotate:  # its attempts end the wait; for the others the remaining time does
        monkeypatch.setattr(endpoint, "_backoff", lambda state: 0.0)
    headers = f"retry-after: {value}\r\ndate: {value}\r\nretry-after-ms: {value}\r\n"
    changes = {"patience_s": 0.3, "max_attempts": 2} if ask is annotate else {"timeout_s": 0.3}
    with serving(sends(http(b"{}", "429 Slower", headers))) as server:
        refusal(ask, server, **changes)


@pytest.mark.parametrize("reset", ["99d", "9999999h", "999999999d" * 9, "9" * 20_000])
def test_a_rate_limit_that_comes_back_after_the_patience_stops_the_stage(reset):
    limits = f"x-ratelimit-reset-requests: {reset}\r\nx-ratelimit-limit-requests: 5\r\n"
    limits += "x-ratelimit-remaining-requests: 0\r\n"
    answered = {"choices": [{"message": {"content": "no answer"}, "finish_reason": "stop"}]}
    with serving(sends(http(json.dumps(answered).encode(), headers=limits))) as server:
        if reset.isdigit():  # without a unit it is not a duration
            annotate(server.url, timeout_s=5.0)
        else:  # the next request would be the corrective turn
            assert "asks to wait" in refusal(annotate, server, timeout_s=5.0, patience_s=60.0)
    assert len(server.requests) == 1 + reset.isdigit()


DATE = st.one_of(
    st.text(max_size=60),
    st.from_regex(r"\A[A-Z][a-z]{2}, -?[0-9]{1,5} [A-Z][a-z]{2} [0-9]{1,9} [0-9:]{1,12} \S{0,9}\Z"),
)


@given(value=DATE, sent=DATE)
def test_a_wait_from_any_header_is_a_finite_number_or_none(value, sent):
    for seconds in (seconds_asked(value, sent), refill_s({"x-ratelimit-reset-a": value}, "a", 1)):
        assert seconds is None or 0 <= seconds < float("inf")


@pytest.mark.parametrize(
    "raw", [*map(http, BODIES.values()), http(b"", "307 Elsewhere", "location: http://x/\r\n"),
            http(b'{"data": []}'), http(b'{"data": [{"id": 7}]}')],
)  # fmt: skip
def test_vllm_servers_that_answer_something_else_are_one_sentence(raw, tmp_path):
    tokenizer = load_tokenizer(resolve_policy("micro"))
    with serving(sends(raw)) as server:
        config = OpenAISampler(engine="openai", base_url=server.url, timeout_s=3.0)
        with pytest.raises(InputError, match="can't be used") as raised:
            VllmServersSampler(config, tokenizer, tmp_path / "weights", 1.0)
    assert server.url in str(raised.value)
