"""The sampler for OpenAI-compatible servers against a scripted server: errors, limits, retries."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.schemas.configs import OpenAISampler, SamplingConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import FinishReason
from trace_opd.trace.protocols import Completion, Prompt

PROMPT = Prompt([{"role": "user", "content": "Name three colours."}])
PLAIN = SamplingConfig(max_new_tokens=12)
EXTRA = {"top_k", "min_p", "repetition_penalty", "logprobs", "return_token_ids"}

Reply = tuple[int, dict[str, str], dict[str, Any]]  # status, headers, body


def completion(text: str, **choice: Any) -> Reply:
    message = {"role": "assistant", "content": text}
    fields = {"index": 0, "message": message, "finish_reason": "stop"} | choice
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [fields]}
    return 200, {}, body | {"prompt_token_ids": [7, 8]}


def failure(status: int, headers: dict[str, str] | None = None, **error: Any) -> Reply:
    return status, headers or {}, {"error": {"message": "scripted", **error}}


class Script:
    """Answers request number n by `answer(n, request)`; records requests and their times."""

    def __init__(self, answer: Callable[[int, dict], Reply]) -> None:
        self.answer = answer
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()


@contextmanager
def serving(answer: Callable[[int, dict], Reply]) -> Iterator[tuple[Script, OpenAISampler]]:
    script = Script(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                index = len(script.requests)
                script.requests.append(request)
                script.headers.append({k.lower(): v for k, v in self.headers.items()})
                script.times.append(time.monotonic())
                script.in_flight += 1
                script.most_in_flight = max(script.most_in_flight, script.in_flight)
            status, headers, body = script.answer(index, request)
            with script.lock:
                script.in_flight -= 1
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield script, OpenAISampler(engine="openai", base_url=url, timeout_s=20)
    finally:
        server.shutdown()
        server.server_close()


def sample(
    config: OpenAISampler, sampling: SamplingConfig = PLAIN, seeds: list[list[int]] | None = None
) -> list[list[Completion]]:
    seeds = [[1]] if seeds is None else seeds
    sampler = OpenAIPolicySampler(config, "served-model")
    return sampler.sample([PROMPT] * len(seeds), sampling, seeds)


def test_each_sample_is_one_request_with_its_own_seed_and_all_parameters() -> None:
    with serving(lambda n, request: completion(f"seed {request['seed']}")) as (script, config):
        sampling = SamplingConfig(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=33)
        rows = sample(config, sampling, seeds=[[11, 12], [21, 22, 2**63 - 1]])
    texts = [[c.text for c in row] for row in rows]
    assert texts == [["seed 11", "seed 12"], ["seed 21", "seed 22", f"seed {2**63 - 1}"]]
    assert len(script.requests) == 5
    request = script.requests[0]
    assert request["model"] == "served-model"
    assert request["messages"] == PROMPT.messages
    assert "n" not in request
    named = {k: request[k] for k in ("temperature", "top_p", "top_k", "max_tokens", "min_p")}
    assert named == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_tokens": 33,
        "min_p": 0.0,
    }


def test_truncation_that_is_off_is_sent_as_off_against_server_defaults() -> None:
    with serving(lambda n, request: completion("ok")) as (script, config):
        sample(config)
    assert script.requests[0]["top_k"] == 0
    assert script.requests[0]["top_p"] == 1.0


def test_requests_in_flight_stay_below_the_limit() -> None:
    def slow(n: int, request: dict) -> Reply:
        time.sleep(0.05)
        return completion("ok")

    with serving(slow) as (script, config):
        sample(config.model_copy(update={"concurrency": 3}), seeds=[list(range(12))])
    assert script.most_in_flight == 3


def test_rate_limits_are_waited_out_as_long_as_the_server_asks() -> None:
    def answer(n: int, request: dict) -> Reply:
        return failure(429, {"Retry-After": "1"}) if n == 0 else completion("ok")

    with serving(answer) as (script, config):
        assert sample(config)[0][0].text == "ok"
    assert len(script.requests) == 2
    assert 1.0 <= script.times[1] - script.times[0] < 2.0


def test_retry_after_may_be_a_date() -> None:
    def answer(n: int, request: dict) -> Reply:
        date = formatdate(time.time() + 2, usegmt=True)
        return failure(503, {"Retry-After": date}) if n == 0 else completion("ok")

    with serving(answer) as (script, config):
        assert sample(config)[0][0].text == "ok"
    assert 0.8 <= script.times[1] - script.times[0] < 3.0  # dates have a resolution of 1 s


def test_server_errors_and_answers_without_a_completion_are_tried_again() -> None:
    replies = [failure(500), (200, {}, {"error": "busy"}), completion("ok")]
    with serving(lambda n, request: replies[n]) as (script, config):
        assert sample(config)[0][0].text == "ok"
    assert len(script.requests) == 3
    assert all(request == script.requests[0] for request in script.requests)


def test_an_unavailable_server_is_given_up_after_the_timeout() -> None:
    with serving(lambda n, request: failure(503, {"Retry-After": "0.2"})) as (script, config):
        began = time.monotonic()
        with pytest.raises(InputError, match=r"fails to answer a request for model served-model"):
            sample(config.model_copy(update={"timeout_s": 1.0}))
    assert 3 <= len(script.requests) <= 7
    assert time.monotonic() - began < 3


def test_an_exhausted_quota_is_no_rate_limit() -> None:
    with (
        serving(lambda n, request: failure(429, code="insufficient_quota")) as (script, config),
        pytest.raises(InputError, match="scripted"),
    ):
        sample(config)
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("status", "message"), [(401, "API key is refused"), (404, r"policy\.path"), (400, "refuses")]
)
def test_permanent_refusals_are_one_clear_sentence(status: int, message: str) -> None:
    with (
        serving(lambda n, request: failure(status)) as (script, config),
        pytest.raises(InputError, match=message) as raised,
    ):
        sample(config)
    assert config.base_url in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(script.requests) == (2 if status == 400 else 1)  # 400: once without extra fields


def test_no_server_is_a_clear_error() -> None:
    with serving(lambda n, request: completion("ok")) as (_, config):
        pass  # closed: the port refuses connections
    with pytest.raises(InputError, match=r"cannot be reached .* start the server"):
        sample(config.model_copy(update={"timeout_s": 0.5}))


def strict(n: int, request: dict) -> Reply:
    """A server that refuses fields that OpenAI's own API does not have."""
    unknown = (EXTRA - {"logprobs"}) & set(request)
    return failure(400, code="unknown_parameter") if unknown else completion("ok")


def test_a_server_that_refuses_unknown_fields_gets_none_from_then_on() -> None:
    with serving(strict) as (script, config):
        sampler = OpenAIPolicySampler(config, "m")
        for _ in range(2):
            rows = sampler.sample([PROMPT], PLAIN, [[1]])
            assert rows[0][0].text == "ok"
    assert [bool(EXTRA & set(request)) for request in script.requests] == [True, False, False]
    assert {"temperature", "top_p", "max_tokens", "seed"} <= set(script.requests[-1])


def test_top_k_is_never_silently_left_out() -> None:
    with serving(strict) as (_, config):
        sampler = OpenAIPolicySampler(config, "m")
        for _ in range(2):
            with pytest.raises(InputError, match=r"does not know top_k; set sampling\.top_k=0"):
                sampler.sample([PROMPT], SamplingConfig(top_k=20), [[1]])


IDS = {
    "token_ids": [40, 41, 2],
    "logprobs": {
        "content": [
            {"token": t, "logprob": p, "bytes": None, "top_logprobs": []}
            for t, p in (("a", -0.5), ("b", -1.0), ("", -0.25))
        ]
    },
}


def test_token_ids_and_logprobs_are_kept_where_the_server_gives_them() -> None:
    with serving(lambda n, request: completion("ab", **IDS)) as (_, config):
        row = sample(config)[0][0]
    assert row == Completion("ab", FinishReason.STOP, [40, 41, 2], [-0.5, -1.0, -0.25], [7, 8])


@pytest.mark.parametrize(
    "changed", [{"temperature": 0.7}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 20}]
)
def test_logprobs_that_may_mean_something_else_are_dropped(changed: dict[str, Any]) -> None:
    with serving(lambda n, request: completion("ab", **IDS)) as (_, config):
        row = sample(config, PLAIN.model_copy(update=changed))[0][0]
    assert row.token_ids == [40, 41, 2]
    assert row.logprobs is None


def test_logprobs_without_token_ids_are_dropped() -> None:
    reply = completion("ab", logprobs=IDS["logprobs"])
    with serving(lambda n, request: reply) as (_, config):
        row = sample(config)[0][0]
    assert (row.text, row.token_ids, row.logprobs) == ("ab", None, None)


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_response_that_did_not_end_by_itself_counts_as_truncated(reason: str) -> None:
    with serving(lambda n, request: completion("ab", finish_reason=reason)) as (_, config):
        assert sample(config)[0][0].finish_reason == "length"


def test_half_of_a_surrogate_pair_becomes_a_replacement_character() -> None:
    with serving(lambda n, request: completion("a\ud83d\ude00 \ud800b")) as (_, config):
        assert sample(config)[0][0].text == "a😀 \ufffdb"


def test_the_key_is_the_named_variable_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for-someone-else")
    monkeypatch.setenv("ENDPOINT_KEY", "for-this-one")
    with serving(lambda n, request: completion("ok")) as (script, config):
        sample(config)
        sample(config.model_copy(update={"api_key_env": "ENDPOINT_KEY"}))
    assert "authorization" not in script.headers[0]
    assert script.headers[1]["authorization"] == "Bearer for-this-one"


def test_a_missing_key_stops_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENDPOINT_KEY", raising=False)
    with (
        serving(lambda n, request: completion("ok")) as (script, config),
        pytest.raises(InputError, match=r"ENDPOINT_KEY is not set; export"),
    ):
        OpenAIPolicySampler(config.model_copy(update={"api_key_env": "ENDPOINT_KEY"}), "m")
    assert script.requests == []


def test_a_refused_key_is_not_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDPOINT_KEY", "s3cret")
    reply = 401, {}, {"error": {"message": "bad key s3cret"}}
    with (
        serving(lambda n, request: reply) as (_, config),
        pytest.raises(InputError, match="ENDPOINT_KEY") as raised,
    ):
        sample(config.model_copy(update={"api_key_env": "ENDPOINT_KEY"}))
    assert "s3cret" not in str(raised.value)


def several(*configs: OpenAISampler) -> OpenAISampler:
    return configs[0].model_copy(update={"base_url": [config.base_url for config in configs]})


def echo(n: int, request: dict) -> Reply:
    return completion(f"seed {request['seed']}")


SEEDS = [[10 * i + k for k in range(3)] for i in range(4)]
ECHOED = [[f"seed {seed}" for seed in row] for row in SEEDS]


def test_several_servers_share_the_requests() -> None:
    def slow(n: int, request: dict) -> Reply:
        time.sleep(0.02)
        return echo(n, request)

    with serving(slow) as (one, first), serving(slow) as (other, second):
        rows = sample(several(first, second), seeds=SEEDS)
    assert [[row.text for row in group] for group in rows] == ECHOED
    assert len(one.requests) + len(other.requests) == 12
    assert min(len(one.requests), len(other.requests)) > 2


@pytest.mark.parametrize("how", ["refuses", "breaks"])
def test_what_a_server_fails_to_answer_is_asked_of_another_with_the_same_seed(how: str) -> None:
    def broken(n: int, request: dict) -> Reply:
        return echo(n, request) if n < 2 else failure(500)

    with serving(echo) as (good, first), serving(broken) as (bad, second):
        config = several(first, second)
        if how == "breaks":
            rows = sample(config, seeds=SEEDS)
    if how == "refuses":  # the second port refuses connections
        with serving(echo) as (good, third):
            rows = sample(several(second, third), seeds=SEEDS)
        assert len(good.requests) == 12
    else:
        assert len(good.requests) == 10
        assert {r["seed"] for r in bad.requests} | {r["seed"] for r in good.requests} == {
            seed for row in SEEDS for seed in row
        }
    assert [[row.text for row in group] for group in rows] == ECHOED


def test_only_servers_that_are_admitted_are_asked_and_one_that_failed_is_asked_for_anew() -> None:
    asked: list[str] = []

    def dies_once(n: int, request: dict) -> Reply:
        return failure(500) if n == 1 else echo(n, request)

    with serving(dies_once) as (_, up), serving(echo) as (never, down):
        config = several(up, down)

        def admit(server: str) -> None:
            asked.append(server)
            if server == down.base_url:
                raise openai.APIConnectionError(request=None)  # type: ignore[arg-type]

        sampler = OpenAIPolicySampler(config, "m", admit=admit)
        rows = sampler.sample([PROMPT] * 4, PLAIN, SEEDS)
    assert [[row.text for row in group] for group in rows] == ECHOED
    assert not never.requests
    assert asked.count(str(up.base_url)) == 2
    assert sampler.servers_up == {up.base_url}
