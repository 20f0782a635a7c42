"""The endpoint annotator against a real HTTP server on loopback that answers by a script."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.annotate import ANNOTATE_STAGE
from trace_opd.pipelines.annotators import open_annotator
from trace_opd.pipelines.annotators.journal import Journal
from trace_opd.pipelines.annotators.pace import Pace
from trace_opd.pipelines.annotators.prompting import SHIPPED_PROMPT
from trace_opd.pipelines.endpoint import seconds_asked
from trace_opd.pipelines.stage import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator, SegmentConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS, validate

KEY = "sk-planted-0123456789"
VALID = '{"abstain": false, "spans": [{"segments": [1], "quote": null}], "type": "setup"}'
Reply = tuple[int, dict[str, str], dict | str]


def completion(content: str | None = VALID, finish: str = "stop", **message: str) -> Reply:
    choice = {"message": {"content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, {}, {"choices": [choice], "usage": usage}


def fault(status: int, message: str = "no", headers: dict | None = None, **more: str) -> Reply:
    return status, headers or {}, {"error": {"message": message, **more}}


class Endpoint:
    """Requests seen, and the script: (request's number from 0, its body) -> reply."""

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
            if reply is None:  # hang up without an answer
                self.close_connection = True
                return
            status, headers, content = reply
            raw = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

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


def in_order(*replies: Reply | None) -> Callable[[int, dict], Reply | None]:
    """One reply after another; the last one for ever."""
    return lambda number, body: replies[min(number, len(replies) - 1)]


def tables(count: int, unscored: int = 0) -> tuple[pa.Table, pa.Table, pa.Table]:
    """A problem and `count` different wrong rollouts; the last `unscored` have no verdict."""
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


def test_server_errors_hang_ups_and_half_answers_are_tried_again():
    html, nothing = (200, {}, "<html>busy</html>"), (200, {}, {"choices": []})
    with served(in_order(fault(500), None, html, nothing, completion())) as (endpoint, url):
        (row,) = annotate(url)
    assert row["status"] == "ok"
    assert len(endpoint.requests) == 5


def test_attempts_end():
    with served(in_order(fault(500, "on fire"))) as (endpoint, url):
        with pytest.raises(InputError, match=r"1 of 1 calls failed .*on fire"):
            annotate(url, max_attempts=2)
        assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "insufficient_quota"), (401, "invalid_api_key"), (404, "model_not_found")],
)
def test_what_dooms_every_call_stops_the_stage_at_the_first(status: int, code: str):
    with served(in_order(fault(status, f"told {code}", code=code))) as (endpoint, url):
        with pytest.raises(InputError, match=f"told {code}"):
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
        assert len(endpoint.requests) == 15
        endpoint.script = in_order(completion())
        rows = annotate(url, count=40, journal=tmp_path, concurrency=1)
        assert len(endpoint.requests) == 15 + 35
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
        rows = annotate(url, count=3, concurrency=1)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [refused in request for request in endpoint.requests] == [True, False, False, False]
    assert instead is None or instead in endpoint.requests[-1]


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


def test_requests_keep_to_the_pace_per_minute():
    with served(in_order(completion())) as (endpoint, url):
        annotate(url, count=12, requests_per_minute=300)
    # Five in the first burst, then five a second; a busy server may see the first one late.
    assert endpoint.at[-1] - endpoint.at[0] >= 1


async def _rounds(pace: Pace, outcomes: list[bool]) -> None:
    for rejected in outcomes:
        async with pace.slot() as entered:
            if rejected:
                pace.rejected(entered, 0.0)
            else:
                pace.succeeded()


@pytest.mark.parametrize(
    ("outcomes", "limit"),
    [
        ([True], 12),
        ([True, True], 9),
        ([True, True, True], 1),  # the circuit is broken: one request at a time
        ([True, True, True, False], 6),  # and mended
        ([True] + [False] * 24, 12),
        ([True] + [False] * 25, 13),
        ([False] * 100, 16),
    ],
)
def test_concurrency_falls_by_a_quarter_and_grows_by_one(outcomes: list[bool], limit: int):
    pace = Pace(16, None)
    asyncio.run(_rounds(pace, outcomes))
    assert pace.limit == limit


def test_rejections_of_one_round_cut_only_once():
    async def one_round(pace: Pace) -> None:
        async with pace.slot() as first, pace.slot() as second:
            pace.rejected(first, 0.0)
            pace.rejected(second, 0.0)

    pace = Pace(16, None)
    asyncio.run(one_round(pace))
    assert pace.limit == 12


def test_retry_after_is_read_in_both_of_its_forms():
    assert (seconds_asked("2"), seconds_asked("0.5")) == (2.0, 0.5)
    assert seconds_asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert seconds_asked(soon) == pytest.approx(89, abs=2)
    assert (seconds_asked("soon"), seconds_asked("")) == (None, None)


def test_the_key_reaches_no_row_error_or_journal(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("TEST_KEY", KEY)
    echo = fault(400, f"bad key {KEY}?")
    caplog.set_level("DEBUG")
    with served(in_order(echo, completion())) as (_, url):
        rows = annotate(url, 3, tmp_path, api_key_env="TEST_KEY", concurrency=1)
    assert "bad key ***?" in rows[0]["error"]
    with served(in_order(echo)) as (_, url), pytest.raises(InputError) as stopped:
        annotate(url, api_key_env="TEST_KEY")
    told = [str(rows), str(stopped.value), *(p.read_text() for p in tmp_path.iterdir())]
    told += [r.getMessage() for r in caplog.records if r.name.startswith("trace_opd")]
    assert not [text for text in told if KEY in text]


def test_a_journal_ignores_a_torn_line_and_keeps_the_rest(tmp_path: Path):
    first = Journal(tmp_path)
    first.append("a", {"n": 1})
    first.append("b", {"n": 2})
    first.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    second = Journal(tmp_path)
    assert (second.get("a"), second.get("b")) == ({"n": 1}, None)
    second.append("b", {"n": 3})
    second.close()
    assert Journal(tmp_path).get("b") == {"n": 3}


def test_another_reader_of_answers_asks_nothing_again_and_another_model_does(tmp_path: Path):
    with served(in_order(completion("Segment 1."))) as (endpoint, url):
        assert annotate(url, journal=tmp_path)[0]["status"] == "invalid"
        asked = len(endpoint.requests)
        again = annotate(url, journal=tmp_path, name="again", usd_per_million_prompt_tokens=1.0)
        assert (again[0]["status"], len(endpoint.requests)) == ("invalid", asked)
        annotate(url, journal=tmp_path, model="other")
        assert len(endpoint.requests) == 2 * asked


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


_RUN_STAGE = """
import sys
from trace_opd.data.store import Store
from trace_opd.pipelines.annotate import ANNOTATE_STAGE
from trace_opd.schemas.configs import AnnotateConfig
ANNOTATE_STAGE.run(AnnotateConfig.model_validate_json(sys.argv[1]), Store(sys.argv[2]))
"""


def test_a_killed_stage_goes_on_without_paying_twice(tmp_path: Path):
    store = make_verdicts(tmp_path, 40)
    answered: Counter[str] = Counter()
    killed = threading.Event()

    def script(number: int, body: dict) -> Reply | None:
        if number >= 15 and not killed.is_set():
            killed.wait(60)  # these are never answered: the process that asked is dead by then
            return None
        pens = re.search(r"Pens: (\d+)\.", body["messages"][1]["content"])
        assert pens is not None
        answered[pens.group(1)] += 1
        return completion()

    with served(script) as (_, url):
        request = stage_config(url, concurrency=4)
        arguments = [sys.executable, "-c", _RUN_STAGE, request.model_dump_json(), str(tmp_path)]
        process = subprocess.Popen(arguments)
        draft = ANNOTATE_STAGE.begin(request, store)[1]
        deadline = time.monotonic() + 60
        journalled = 0
        while journalled < 15 and time.monotonic() < deadline:
            time.sleep(0.02)
            files = list(tmp_path.glob(f"annotate/{draft.id}/journal/*.jsonl"))
            journalled = sum(len(file.read_bytes().splitlines()) for file in files)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert journalled == 15
        killed.set()
        dataset = ANNOTATE_STAGE.run(request, store)
    close_engine()
    assert dataset.summary["status"] == {"ok": 40}
    assert dataset.summary["cost_usd"] is None
    assert (len(answered), set(answered.values())) == (40, {1})
    assert dataset.summary["prompt_tokens"] == 40 * 100
