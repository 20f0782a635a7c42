"""The endpoint annotator against a real HTTP server on loopback that follows a script."""

import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.annotators import dialogue, open_annotator
from trace_opd.pipelines.annotators.prompting import SHIPPED_PROMPT, SHIPPED_SCHEMA
from trace_opd.pipelines.annotators.rows import Reading
from trace_opd.pipelines.paid.journal import Journal
from trace_opd.pipelines.paid.prices import Price
from trace_opd.pipelines.paid.spending import open_spending
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator, SegmentConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import AnnotationStatus, DiagnosticType
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS

KEY = "sk-planted-0123456789"
VALID = '{"abstain": false, "spans": [{"segments": [1], "quote": null}], "type": "setup"}'
# A str body is sent unchanged. A bytes body is half of the announced length; then the connection is
# closed. A list is sent slowly, one piece per 0.1 s.
Reply = tuple[int, dict[str, str], dict | str | bytes | list[str]]


def completion(content: str | None = VALID, finish: str = "stop", **message: str) -> Reply:
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, {}, {"choices": [choice], "usage": usage}


def fault(status: int, message: str = "no", headers: dict | None = None, **more: str) -> Reply:
    return status, headers or {}, {"error": {"message": message, **more}}


class Endpoint:
    """The requests received, and the script: (request's number from 0, its body) -> reply."""

    def __init__(self, script: Callable[[int, dict], Reply | None]) -> None:
        self.script = script
        self.requests: list[dict] = []
        self.headers: list[Message] = []
        self.at: list[float] = []
        self.lock = threading.Lock()


@contextmanager
def served(script: Callable[[int, dict], Reply | None]) -> Iterator[tuple[Endpoint, str]]:
    endpoint = Endpoint(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with endpoint.lock:
                number = len(endpoint.requests)
                endpoint.requests.append(body)
                endpoint.headers.append(self.headers)
                endpoint.at.append(time.monotonic())
            reply = endpoint.script(number, body)
            if reply is None:  # close the connection without an answer
                self.close_connection = True
                return
            status, headers, content = reply
            pieces = content if isinstance(content, list) else [content]
            raws = [as_bytes(piece) for piece in pieces]
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name, value)
            half = isinstance(content, bytes)
            self.send_header("content-length", str(sum(map(len, raws)) * (2 if half else 1)))
            self.end_headers()
            for number, raw in enumerate(raws):
                time.sleep(0.1 if number else 0.0)
                with suppress(ConnectionError):  # the client may have closed it
                    self.wfile.write(raw)
            self.close_connection = half

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield endpoint, f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_bytes(content: dict | str | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def in_order(*replies: Reply | None) -> Callable[[int, dict], Reply | None]:
    """One reply after another; the last one repeats."""
    return lambda number, body: replies[min(number, len(replies) - 1)]


def tables(count: int, unscored: int = 0) -> tuple[pa.Table, pa.Table, pa.Table]:
    """A problem and `count` distinct wrong rollouts; the last `unscored` have no verdict."""
    problem = {
        "problem_id": "p", "problem": "3 boxes of 4 pens?", "answer": "12", "answer_kind": "math",
        "solution": None, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip
    rollout = {
        "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": "stop",
        "policy_name": "test", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "on_policy": False,
    }  # fmt: skip
    verdict = {"parsed_answer": "7", "status": "ok", "verifier": "test", "seconds": 0.0}
    ids = [{"rollout_id": f"r{i}", "problem_id": "p", "group_id": "g"} for i in range(count)]
    return (
        PROBLEMS.table([problem]),
        ROLLOUTS.table(
            rollout
            | row
            | {"sample_index": i, "seed": i, "response": f"Boxes: 3.\nPens: {i}.\nSo 3 + 4 = 7."}
            for i, row in enumerate(ids)
        ),
        VERDICTS.table(
            verdict | row | ({"reward": 0.0, "correct": False} if i < count - unscored else {})
            for i, row in enumerate(ids)
        ),
    )


def config(url: str, **changes) -> OpenAIAnnotator:
    return OpenAIAnnotator(
        **{"engine": "openai", "base_url": url, "model": "m", "api_key_env": None} | changes
    )


def annotate(url: str, count: int = 1, journal: Path | None = None, **changes) -> list[dict]:
    annotator = open_annotator(config(url, **changes), SegmentConfig(), journal=journal)
    try:
        table = annotator.annotate(*tables(count))
    finally:
        annotator.close()
    return validate(table, ANNOTATIONS).to_pylist()


def test_a_valid_answer_becomes_a_row_with_tokens_cost_and_time(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with served(in_order(completion())) as (endpoint, url):
        (row,) = annotate(
            url,
            api_key_env="TEST_KEY",
            usd_per_million_prompt_tokens=2.0,
            usd_per_million_completion_tokens=30.0,
        )
    assert (row["status"], row["diagnostic_type"]) == ("ok", "setup")
    assert [span["text"] for span in row["spans"]] == ["Pens: 0.\n"]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (100, 10)
    assert row["cost_usd"] == pytest.approx((100 * 2 + 10 * 30) / 1e6)
    assert row["latency_s"] > 0
    assert (row["annotator_model"], row["prompt_version"]) == ("m", "annotate-v1")
    (request,) = endpoint.requests
    assert request["response_format"]["json_schema"]["strict"] is True
    assert (request["max_tokens"], request["temperature"]) == (512, 0.0)
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_without_a_price_the_cost_is_unknown_and_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with served(in_order(completion())) as (endpoint, url):
        (row,) = annotate(url, structured=False)
    assert row["cost_usd"] is None
    assert "response_format" not in endpoint.requests[0]
    assert "Authorization" not in endpoint.headers[0]


def test_an_invalid_answer_gets_one_corrective_turn_and_both_are_counted():
    with served(in_order(completion("Segment 1."), completion())) as (endpoint, url):
        (row,) = annotate(url)
    assert (row["status"], row["prompt_tokens"], row["raw_answer"]) == ("ok", 200, VALID)
    roles = [message["role"] for message in endpoint.requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_what_stays_invalid_is_a_row_with_its_raw_answer():
    with served(in_order(completion("Segment 1."))) as (endpoint, url):
        (row,) = annotate(url)
    assert (row["status"], row["spans"], row["raw_answer"]) == ("invalid", [], "Segment 1.")
    assert "not one JSON object" in row["error"]
    assert len(endpoint.requests) == 2


def test_rate_limits_are_waited_out_as_the_server_asks():
    limited = fault(429, headers={"Retry-After": "1"}, code="rate_limit_exceeded")
    with served(in_order(limited, completion())) as (endpoint, url):
        (row,) = annotate(url)
    assert row["status"] == "ok"
    assert len(endpoint.requests) == 2
    assert 1.0 <= endpoint.at[1] - endpoint.at[0] < 3.0


@pytest.mark.parametrize(
    "broken",
    [
        fault(500),
        fault(503),
        (502, {"content-type": "text/html"}, "<html>Bad Gateway</html>"),
        fault(408),
        None,  # closes the connection without an answer
        (200, {}, b'{"choices": [{"mess'),  # closes the connection in the middle of an answer
        (200, {}, '{"choices": [{"mess'),
        (200, {}, "<html>busy</html>"),
        (200, {}, ""),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": None, "error": {"message": "upstream is busy", "code": 502}}),
        (200, {"content-encoding": "gzip"}, "not gzip"),
    ],
)
def test_transient_failures_are_retried(broken: Reply | None):
    with served(in_order(broken, completion())) as (endpoint, url):
        (row,) = annotate(url)
    assert row["status"] == "ok"
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("late", ["silent", "dripping"])
def test_an_answer_that_is_late_is_given_up_and_asked_for_again(late: str):
    def script(number: int, body: dict) -> Reply:
        if number:
            return completion()
        if late == "silent":
            time.sleep(2.0)
            return completion()
        return 200, {}, [" "] * 20  # sends a byte often enough to reset a read timeout

    with served(script) as (endpoint, url):
        (row,) = annotate(url, timeout_s=0.5)
    assert row["status"] == "ok"
    assert endpoint.at[1] - endpoint.at[0] < 1.9


def test_an_answer_without_usage_is_used_and_its_tokens_are_unknown():
    _, _, body = completion()
    assert isinstance(body, dict)
    for usage in ({}, {"usage": None}, {"usage": {}}):
        reply: Reply = (200, {}, {"choices": body["choices"]} | usage)
        with served(in_order(reply)) as (endpoint, url):
            (row,) = annotate(url)
        assert (row["status"], row["prompt_tokens"], len(endpoint.requests)) == ("ok", None, 1)
        assert row["cost_usd"] is None


@pytest.mark.parametrize(
    "usage",
    [
        [], "many", 7, {"prompt_tokens": 1.5, "completion_tokens": 1},
        {"prompt_tokens": "9", "completion_tokens": 1}, {"prompt_tokens": [9]},
        {"prompt_tokens": -5, "completion_tokens": 1},
        {"prompt_tokens": 2**31, "completion_tokens": 1},
        {"prompt_tokens": 10**30, "completion_tokens": 10**30}, {"prompt_tokens": True},
    ],
)  # fmt: skip
def test_an_answer_is_kept_whatever_its_usage_is(tmp_path: Path, usage):
    _, _, body = completion()
    assert isinstance(body, dict)
    with served(in_order((200, {}, body | {"usage": usage}))) as (endpoint, url):
        for _ in range(2):  # first from the endpoint, then from the journal
            (row,) = annotate(url, journal=tmp_path, **PRICE)
            assert (row["status"], row["prompt_tokens"], row["cost_usd"]) == ("ok", None, None)
        assert len(endpoint.requests) == 1


def test_tokens_of_two_turns_that_do_not_fit_the_table_are_unknown():
    _, _, body = completion("Segment 1.")
    assert isinstance(body, dict)
    usage = {"prompt_tokens": 2**31 - 1, "completion_tokens": 1, "prompt_tokens_details": "none"}
    with served(in_order((200, {}, body | {"usage": usage}))) as (endpoint, url):
        (row,) = annotate(url)
    assert (row["status"], len(endpoint.requests)) == ("invalid", 2)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (None, 2)


@pytest.mark.parametrize(
    "more", [[], [{"type": "image_url"}, 7, None, {"type": "text", "text": 7}]]
)
def test_an_answer_in_parts_is_their_text(more: list):
    first, second = VALID[:20], VALID[20:]
    parts = [{"type": "thinking", "text": "Hm."}, {"type": "text", "text": first}, *more, second]
    with served(in_order(completion(parts, refusal=""))) as (endpoint, url):  # type: ignore[arg-type]
        (row,) = annotate(url)
    assert (row["status"], row["raw_answer"], len(endpoint.requests)) == ("ok", VALID, 1)


def test_an_unreachable_server_is_one_sentence():
    with pytest.raises(InputError, match=r"http://127.0.0.1:1/v1: 1 of 1 calls failed .*onnection"):
        annotate("http://127.0.0.1:1/v1", max_attempts=1)


def test_attempts_end():
    with served(in_order(fault(500, "on fire"))) as (endpoint, url):
        with pytest.raises(InputError, match=r"1 of 1 calls failed .*on fire"):
            annotate(url, max_attempts=2)
        assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "insufficient_quota"),
        (429, "billing_not_active"),
        (402, "no_credit"),
        (401, "invalid_api_key"),
        (404, "model_not_found"),
    ],
)
def test_a_failure_of_every_call_stops_the_stage_at_the_first(status: int, code: str):
    with served(in_order(fault(status, f"refused {code}", code=code))) as (endpoint, url):
        with pytest.raises(InputError, match=f"refused {code}"):
            annotate(url, count=20, concurrency=1)
        assert len(endpoint.requests) == 1


def test_a_bad_request_is_one_failed_row_and_not_repeated():
    def script(number: int, body: dict) -> Reply:
        unlucky = "Pens: 1." in body["messages"][1]["content"]
        return fault(400, "flagged", code="content_policy") if unlucky else completion()

    with served(script) as (endpoint, url):
        rows = annotate(url, count=4)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok"]
    assert "flagged" in rows[1]["error"]
    assert len(endpoint.requests) == 4


def test_more_than_half_failing_stops_and_keeps_what_was_paid(tmp_path: Path):
    def script(number: int, body: dict) -> Reply:
        return completion() if number < 5 else fault(400, "no more")

    with served(script) as (endpoint, url):
        with pytest.raises(InputError, match=r"10 of 15 calls failed .*no more"):
            annotate(url, count=40, journal=tmp_path, concurrency=1)
        asked = len(endpoint.requests)
        assert 15 <= asked <= 16  # one may be sent before the last failure is processed
        endpoint.script = in_order(completion())
        rows = annotate(url, count=40, journal=tmp_path, concurrency=1)
        assert len(endpoint.requests) == asked + 35
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.parametrize(
    ("message", "refused", "instead"),
    [
        ("unknown field: response_format", "response_format", None),
        (
            "Unsupported parameter: 'max_tokens' is not supported",
            "max_tokens",
            "max_completion_tokens",
        ),
        ("Unsupported value: 'temperature' does not support 0.0", "temperature", None),
    ],
)
def test_a_refused_parameter_is_left_out_from_then_on(message, refused, instead):
    def script(number: int, body: dict) -> Reply:
        return fault(400, message) if refused in body else completion()

    with served(script) as (endpoint, url):
        rows = annotate(url, count=8, concurrency=1)
    assert [row["status"] for row in rows] == ["ok"] * 8
    # Two requests were in flight at the first refusal; a schema has two forms that can be refused.
    asked = [refused in request for request in endpoint.requests]
    assert asked[0]
    assert sum(asked) <= 4
    assert not any(asked[-6:])
    assert instead is None or instead in endpoint.requests[-1]


def test_a_server_that_knows_no_schema_is_asked_for_a_json_object():
    def script(number: int, body: dict) -> Reply:
        if body["response_format"]["type"] == "json_schema":
            return fault(400, "This response_format type is unavailable now")
        objects = [r for r in endpoint.requests if r["response_format"]["type"] == "json_object"]
        return completion("{}") if len(objects) == 1 else completion()

    with served(script) as (endpoint, url):
        rows = annotate(url, count=4, concurrency=1)
    assert [row["status"] for row in rows] == ["ok"] * 4  # one after a corrective turn
    kinds = [request["response_format"]["type"] for request in endpoint.requests]
    assert kinds[0] == "json_schema"
    assert kinds.count("json_schema") <= 2
    assert kinds.count("json_object") == 5


def test_one_refused_row_takes_the_schema_from_no_other():
    def script(number: int, body: dict) -> Reply:
        hostile = "Pens: 0." in body["messages"][1]["content"]
        return fault(400, "unknown response_format in: Pens: 0.") if hostile else completion()

    with served(script) as (endpoint, url):
        rows = annotate(url, count=4, concurrency=1)
    assert [row["status"] for row in rows] == ["failed", "ok", "ok", "ok"]
    kinds = [request["response_format"]["type"] for request in endpoint.requests[-3:]]
    assert kinds == ["json_schema"] * 3


def test_a_cut_answer_is_asked_for_again_with_a_raised_limit():
    with served(in_order(completion('{"abs', "length"), completion())) as (endpoint, url):
        (row,) = annotate(url, max_new_tokens=20)
    assert (row["status"], row["completion_tokens"]) == ("ok", 20)
    assert [request["max_tokens"] for request in endpoint.requests] == [20, 80]


def test_a_refusal_is_an_abstention_with_its_words_kept():
    with served(in_order(completion(None, refusal="I'd rather not."))) as (_, url):
        (row,) = annotate(url)
    assert (row["status"], row["raw_answer"]) == ("abstained", "I'd rather not.")


def test_rows_without_a_verdict_cost_no_call():
    with served(in_order(completion())) as (endpoint, url):
        annotator = open_annotator(config(url), SegmentConfig())
        rows = annotator.annotate(*tables(3, unscored=2)).to_pylist()
        annotator.close()
    assert [row["status"] for row in rows] == ["ok", "skipped", "skipped"]
    assert len(endpoint.requests) == 1


def test_concurrency_is_used_and_not_exceeded():
    flying, most = 0, 0
    lock = threading.Lock()

    def script(number: int, body: dict) -> Reply:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.3)  # long enough for a busy machine to send six
        with lock:
            flying -= 1
        return completion()

    with served(script) as (_, url):
        annotate(url, count=24, concurrency=6)
    assert most == 6


def test_a_slow_disk_holds_requests_back(tmp_path: Path, monkeypatch):
    append, kept, unkept = Journal.append, [], []

    def append_slowly(journal, lines):
        time.sleep(0.05)
        append(journal, lines)
        kept.extend(lines)

    def answer(number: int, body: dict) -> Reply:
        unkept.append(number + 1 - len(kept))
        return completion()

    monkeypatch.setattr(Journal, "append", append_slowly)
    with served(answer) as (_, url):
        annotate(url, count=40, journal=tmp_path, concurrency=8)
    assert len(kept) == 40
    assert max(unkept) <= 8  # the most that a kill can lose


def test_equal_responses_are_one_question():
    problems, rollouts, verdicts = tables(6)
    same = rollouts.set_column(
        rollouts.column_names.index("response"), "response", pa.array(["Boxes: 3.\nSo 7."] * 6)
    )
    with served(in_order(completion())) as (endpoint, url):
        annotator = open_annotator(config(url), SegmentConfig())
        rows = annotator.annotate(problems, same, verdicts).to_pylist()
        annotator.close()
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert len(endpoint.requests) == 1


def test_tokens_keep_to_the_pace_per_minute():
    with served(in_order(completion())) as (endpoint, url):
        # 40 tokens a second; an answer takes 110, whatever was reserved for it.
        annotate(url, count=3, tokens_per_minute=2400, max_new_tokens=16, concurrency=1)
    assert endpoint.at[-1] - endpoint.at[0] >= 2 * 110 / 40 - 1.0


def test_a_used_up_rate_limit_is_waited_for_before_a_429():
    left = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}
    status, _, body = completion()
    used_up: Reply = (status, left | {"x-ratelimit-reset-requests": "1m0s"}, body)
    with served(in_order(used_up, completion())) as (endpoint, url):
        annotate(url, count=2, concurrency=1)
    assert 1.0 <= endpoint.at[1] - endpoint.at[0] < 2.0


def test_a_request_above_the_limit_is_not_waited_for():
    too_large = fault(429, "Request too large for m on tokens per min (TPM): Limit 1, Requested 9")
    with served(in_order(too_large)) as (endpoint, url):
        with pytest.raises(InputError, match="Request too large"):
            annotate(url)
        assert len(endpoint.requests) == 1


def test_an_endpoint_that_stops_answering_stops_the_stage_and_paid_answers_are_kept(tmp_path: Path):
    def script(number: int, body: dict) -> Reply:
        return completion() if number < 3 else fault(503, "maintenance")

    with served(script) as (endpoint, url):
        with pytest.raises(InputError, match=r"no answer for 2 s .*maintenance"):
            annotate(url, 30, tmp_path, concurrency=2, patience_s=2.0, max_attempts=99)
        endpoint.script = in_order(completion())
        before = len(endpoint.requests)
        assert {row["status"] for row in annotate(url, 30, tmp_path)} == {"ok"}
        assert len(endpoint.requests) == before + 27


def test_a_wait_above_the_patience_stops_the_stage():
    tomorrow = fault(429, "daily limit", headers={"Retry-After": "86400"})
    with served(in_order(tomorrow)) as (endpoint, url):
        with pytest.raises(InputError, match=r"asks to wait 86400 s .*daily limit"):
            annotate(url, count=8, concurrency=1)
        assert len(endpoint.requests) == 1


def test_a_stop_wakes_waiting_requests():
    def script(number: int, body: dict) -> Reply:
        if number == 0:
            return fault(500, headers={"Retry-After": "60"})  # its next attempt would be in 60 s
        time.sleep(0.3)
        return fault(401, "no such key")

    with served(script) as (_, url):
        began = time.monotonic()
        with pytest.raises(InputError, match="no such key"):
            annotate(url, count=8, concurrency=2)
        assert time.monotonic() - began < 10


PRICE = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}


def test_a_spent_budget_stops_the_stage_and_more_of_it_goes_on(tmp_path: Path):
    with served(in_order(completion())) as (endpoint, url):
        # A row costs 120 millionths; its reserved worst case is far above that.
        with pytest.raises(InputError, match=r"budget of \$0.01 .*raise annotator.budget_usd"):
            annotate(url, 60, tmp_path, budget_usd=0.01, **PRICE)
        paid = len(endpoint.requests)
        assert 10 < paid < 60
        assert paid * 120e-6 <= 0.01
        rows = annotate(url, 60, tmp_path, budget_usd=1.0, **PRICE)
        assert len(endpoint.requests) == 60
    assert {row["status"] for row in rows} == {"ok"}
    assert sum(row["cost_usd"] for row in rows) == pytest.approx(60 * 120e-6)


def test_an_answer_lost_in_flight_counts_into_the_budget():
    """A closed connection does not show whether the answer was generated and billed."""
    with served(in_order(None)) as (endpoint, url):
        with pytest.raises(InputError, match=r"budget of \$0.01"):
            annotate(url, budget_usd=0.01, max_attempts=99, **PRICE)
        assert len(endpoint.requests) < 10


@pytest.mark.parametrize("refused", [fault(503), fault(429), fault(529), fault(408)])
def test_refused_requests_cost_nothing(tmp_path: Path, refused: Reply):
    status, _, body = refused
    reply = (status, {"Retry-After": "0"}, body)
    with served(in_order(*[reply] * 6, completion())) as (endpoint, url):
        annotate(url, journal=tmp_path, budget_usd=0.01, concurrency=1, max_attempts=9, **PRICE)
        assert len(endpoint.requests) == 7
    assert spent_usd(tmp_path) == pytest.approx(120e-6)


def spent_usd(journal: Path) -> float:
    """The amount that a new run counts as spent."""
    with closing(open_spending(config("http://x/v1", budget_usd=1.0, **PRICE), journal)) as opened:
        assert opened.budget is not None
        return opened.budget.spent_usd + opened.budget.possibly_usd


def test_a_server_that_is_not_there_costs_nothing(tmp_path: Path):
    with pytest.raises(InputError, match="onnection"):
        annotate("http://127.0.0.1:1/v1", 3, tmp_path, budget_usd=0.01, max_attempts=1, **PRICE)
    assert spent_usd(tmp_path) == 0


@pytest.mark.parametrize(
    "lost",
    [
        None,
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, "<html>busy</html>"),
        fault(500),
        fault(502),
        fault(504),
        (200, {}, completion()[2] | {"usage": {"prompt_tokens": -(10**9), "completion_tokens": 1}}),  # type: ignore[operator]
        (200, {}, completion()[2] | {"usage": "none"}),  # type: ignore[operator]
    ],
)  # fmt: skip
def test_a_budget_holds_over_runs_whatever_becomes_of_the_answers(tmp_path: Path, lost):
    """Each request is billed at its worst case, whatever the client receives."""
    price, budget = Price(prompt=1.0, completion=2.0), 0.015
    with served(in_order(lost)) as (endpoint, url):
        for count in (2, 8, 12):
            before = len(endpoint.requests)
            with suppress(InputError):
                annotate(url, count, tmp_path, budget_usd=budget, max_attempts=1, **PRICE)
        assert len(endpoint.requests) == before  # no money is left for the last request
        billed = sum(map(price.worst_case_usd, endpoint.requests))
    assert 0.7 * budget < billed <= budget
    assert spent_usd(tmp_path) == pytest.approx(billed)


def test_an_interrupt_ends_the_requests_in_flight_first(tmp_path: Path):
    def script(number: int, body: dict) -> Reply:
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return completion()

    with served(script) as (endpoint, url):
        with pytest.raises(KeyboardInterrupt):
            annotate(url, 40, tmp_path, concurrency=4)
        asked = len(endpoint.requests)
        assert asked <= 8
        endpoint.script = in_order(completion())
        annotate(url, 40, tmp_path)
        assert len(endpoint.requests) == 40


def test_requests_keep_to_the_pace_per_minute():
    with served(in_order(completion())) as (endpoint, url):
        annotate(url, count=12, requests_per_minute=300)
    # Five in the first burst, then five a second; a busy server may see the first one late.
    assert endpoint.at[-1] - endpoint.at[0] >= 1


def test_the_key_reaches_no_row_error_or_journal(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("TEST_KEY", KEY)
    echo = fault(400, f"bad key {KEY}?")
    caplog.set_level("DEBUG")
    with served(in_order(echo, completion())) as (_, url):
        rows = annotate(url, 3, tmp_path, api_key_env="TEST_KEY", concurrency=1)
    assert "bad key ***?" in rows[0]["error"]
    assert f" at {url}: " in caplog.text
    with served(in_order(echo)) as (_, url), pytest.raises(InputError) as stopped:
        annotate(url, api_key_env="TEST_KEY")
    texts = [str(rows), str(stopped.value), *(p.read_text() for p in tmp_path.iterdir())]
    texts += [r.getMessage() for r in caplog.records if r.name.startswith("trace_opd")]
    assert not [text for text in texts if KEY in text]


def test_what_only_reads_an_answer_asks_nothing_again(tmp_path: Path, monkeypatch):
    with served(in_order(completion("Segment 1."))) as (endpoint, url):
        assert annotate(url, journal=tmp_path)[0]["status"] == "invalid"
        asked = len(endpoint.requests)
        assert annotate(url, journal=tmp_path, name="again", **PRICE)[0]["status"] == "invalid"
        assert annotate(url, journal=tmp_path, corrective_turns=0)[0]["status"] == "invalid"
        lenient = Reading(AnnotationStatus.OK, [[1]], DiagnosticType.OTHER)
        monkeypatch.setattr(dialogue, "read_answer", lambda *_: lenient)
        (row,) = annotate(url, journal=tmp_path)
        assert (row["status"], row["raw_answer"]) == ("ok", "Segment 1.")
        assert len(endpoint.requests) == asked


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"structured": False},
        {"temperature": 0.7},
        {"max_new_tokens": 100},
        {"prompt": "prompt.md"},
        {"answer_schema": "schema.json"},
        {"base_url": "http://localhost:{port}/v1"},
    ],
)
def test_what_decides_an_answer_asks_again(tmp_path: Path, monkeypatch, change: dict):
    monkeypatch.chdir(tmp_path)
    Path("prompt.md").write_text(SHIPPED_PROMPT.read_text().replace("Mark little", "Mark less"))
    Path("schema.json").write_text(
        SHIPPED_SCHEMA.read_text().replace('"maxItems": 8', '"maxItems": 7')
    )
    with served(in_order(completion())) as (endpoint, url):
        port = url.split(":")[2].split("/")[0]
        changed = {name: str(value).format(port=port) if name == "base_url" else value
                   for name, value in change.items()}  # fmt: skip
        annotate(url, journal=tmp_path / "journal")
        annotate(**{"url": url, "journal": tmp_path / "journal"} | changed)
        assert len(endpoint.requests) == 2
        annotate(url, journal=tmp_path / "journal")
        assert len(endpoint.requests) == 2


def make_verdicts(root: Path, count: int) -> Store:
    store = Store(root)
    inputs: dict = {}
    for contract, table in zip((PROBLEMS, ROLLOUTS, VERDICTS), tables(count), strict=True):
        draft = store.begin(contract.name, {}, inputs, contract)
        draft.write_part(0, table)
        inputs = {contract.name: draft.finish(1)}
    store.set_alias("verdicts", inputs["verdicts"])
    return store


def stage_config(url: str, **changes) -> AnnotateConfig:
    return AnnotateConfig(annotator=config(url, **changes))


def test_a_missing_key_stops_before_the_work(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    store = make_verdicts(tmp_path, 1)
    with pytest.raises(InputError, match="TEST_KEY is not set"):
        ANNOTATE_STAGE.run(stage_config("http://127.0.0.1:1/v1", api_key_env="TEST_KEY"), store)
    assert not (tmp_path / "annotate").exists()


def test_the_dataset_id_follows_the_prompts_words_not_its_path(tmp_path: Path):
    store = make_verdicts(tmp_path / "store", 1)
    copy = tmp_path / "copy.md"
    copy.write_text(SHIPPED_PROMPT.read_text())

    def made_id(prompt: str | None) -> str:
        return ANNOTATE_STAGE.begin(stage_config("http://x/v1", prompt=prompt), store)[1].id

    shipped = made_id(None)
    assert made_id(str(copy)) == shipped
    copy.write_text(SHIPPED_PROMPT.read_text() + "\nBe careful.\n")
    assert made_id(str(copy)) != shipped


def run_stage(request: AnnotateConfig, root: Path) -> None:
    ANNOTATE_STAGE.run(request, Store(root))
    os._exit(0)  # without the handlers that the fork inherits from whatever tests ran before


def journalled(root: Path) -> list[str]:
    """Ids of the answers in complete lines of a store's journals."""
    answered = []
    for path in root.glob("annotate/**/*.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                answered.append(json.loads(line)["record"]["body"]["id"])
    return answered


def test_a_stage_killed_again_and_again_pays_for_no_answer_twice(tmp_path: Path):
    """SIGKILL at random moments: only requests in flight are repeated; the table is the same."""
    rng = random.Random(0)
    asked: Counter[str] = Counter()

    def script(number: int, body: dict) -> Reply:
        texts = [message["content"] for message in body["messages"]]
        pens = re.search(r"Pens: (\d+)\.", texts[1])
        assert pens is not None
        turn = f"{pens[1]}-{len(texts)}"
        asked[turn] += 1
        time.sleep(0.05)
        # Every third needs a corrective turn; the marks depend on the content alone.
        first_of_three = len(texts) == 2 and int(pens[1]) % 3 == 0
        answer = "Segment 1." if first_of_three else VALID.replace("[1]", f"[{int(pens[1]) % 2}]")
        status, headers, reply = completion(answer)
        assert isinstance(reply, dict)
        return status, headers, reply | {"id": turn}

    fork = multiprocessing.get_context("fork")
    with served(script) as (_endpoint, url):
        request = stage_config(url, concurrency=4)
        undisturbed = ANNOTATE_STAGE.run(request, make_verdicts(tmp_path / "undisturbed", 120))
        close_engine()
        assert (len(asked), set(asked.values())) == (160, {1})
        asked.clear()
        root = tmp_path / "killed"
        make_verdicts(root, 120)
        kills = 0
        while True:
            paid = Counter({turn: asked[turn] for turn in journalled(root)})
            process = fork.Process(target=run_stage, args=(request, root))
            process.start()
            process.join(rng.uniform(0.2, 0.5) if kills < 6 else 60)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            # No journalled question is repeated.
            assert paid == {turn: asked[turn] for turn in paid}
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
    assert kills == 6
    assert len(asked) == 160
    assert sum(asked.values()) - 160 <= 2 * 4 * kills  # in flight or not yet on disk
    finished = ANNOTATE_STAGE.run(request, Store(root))
    assert finished.id == undisturbed.id
    timing = ["latency_s"]
    assert finished.read().drop_columns(timing) == undisturbed.read().drop_columns(timing)
