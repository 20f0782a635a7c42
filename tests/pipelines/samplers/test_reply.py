"""Checks of a sampler server's replies: values that no policy can give stop the stage."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trace_opd.pipelines.endpoint import NotACompletion
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.openai import OpenAIPolicySampler
from trace_opd.pipelines.samplers.reply import read_completion
from trace_opd.pipelines.samplers.rollouts import rollouts_table
from trace_opd.schemas.configs import OpenAISampler, PromptConfig, SamplingConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import FinishReason
from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS
from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import load_tokenizer, vocab_size
from trace_opd.trace.protocols import Completion

SERVER = "http://server:8000/v1"
VOCAB = 50


def body(
    logprobs: Any = (-0.5, -1.0), choices: int = 1, prompt: Any = (7, 8), **choice: Any
) -> bytes:
    fields = {"message": {"content": "ab"}, "finish_reason": "stop", "token_ids": [4, 2]}
    fields["logprobs"] = {"content": [{"logprob": value} for value in logprobs]}
    return json.dumps(
        {"choices": [fields | choice] * choices, "prompt_token_ids": list(prompt)}
    ).encode()


def read(content: bytes, prompt: list[int] | None = None) -> Completion:
    return read_completion(content, SERVER, 8, VOCAB, prompt)


def test_a_possible_completion_is_kept_as_it_is():
    expected = Completion("ab", FinishReason.STOP, [4, 2], [-0.5, -1.0], [7, 8])
    assert read(body(), prompt=[7, 8]) == expected
    # An id in the vocabulary's padding, and a log-probability that rounded to above 0.
    edge = read(body(token_ids=[0, VOCAB - 1], logprobs=[1e-6, -1e4]))
    assert (edge.token_ids, edge.logprobs) == ([0, VOCAB - 1], [1e-6, -1e4])


@pytest.mark.parametrize("token", [-1, VOCAB, 10**6, 2**31, 10**30, 1.0, 1.5, "4", None, True, [4]])
@pytest.mark.parametrize("name", ["token_ids", "prompt_token_ids"])
def test_token_ids_outside_the_vocabulary_are_refused(name, token):
    content = body(token_ids=[4, token]) if name == "token_ids" else body(prompt=[7, token])
    with pytest.raises(InputError, match=rf"^{SERVER}: sends {name} outside the .*0 … 49"):
        read(content)


@pytest.mark.parametrize("value", [5.0, 0.01, float("nan"), float("inf"), -float("inf"), -1e400])
def test_impossible_log_probabilities_are_refused(value):
    with pytest.raises(InputError, match=rf"^{SERVER}: sends a log-probability"):
        read(body(logprobs=[-0.5, value]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (body(logprobs=[-0.5]), "another number of log-probabilities"),
        (body(logprobs=[-0.5] * 3), "another number of log-probabilities"),
        (body(choices=2), "more choices"),
        (body(finish_reason="abort"), "a finish_reason that is none of stop, length"),
        (body(finish_reason=None), "a finish_reason"),
        (body(finish_reason=["stop"]), "a finish_reason"),
        (body(token_ids=[4] * 9, logprobs=[-1.0] * 9), "more tokens than max_tokens=8"),
        (body(finish_reason="\x1b[31m\n" + "x" * 999), "a finish_reason"),
    ],
)
def test_a_completion_that_was_not_asked_for_is_refused(content, message):
    with pytest.raises(InputError, match=f"^{SERVER}: sends {message}") as raised:
        read(content)
    assert len(str(raised.value)) < 400
    assert str(raised.value).isprintable()


def test_a_prompt_that_the_server_renders_otherwise_is_refused():
    with pytest.raises(InputError, match="other prompt_token_ids"):
        read(body(), prompt=[7, 9])


@pytest.mark.parametrize(
    "choice", [{"message": None}, {"token_ids": "4"}, {"logprobs": {"content": [None]}},
               {"message": {"content": ["a"]}}],
)  # fmt: skip
def test_what_is_no_completion_may_be_asked_for_again(choice):
    with pytest.raises(NotACompletion):
        read(body(**choice))


@pytest.fixture
def scripted() -> Iterator[Any]:
    """A server on loopback that answers every request with the body that is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def rollouts(server: Any) -> list[dict[str, Any]]:
    problem = {
        "problem_id": "p", "problem": "1+1?", "answer": "2", "answer_kind": "math",
        "solution": None, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip
    sampler = OpenAIPolicySampler(
        OpenAISampler(engine="openai", base_url=server.url), resolve_policy("micro")
    )
    table = rollouts_table(
        PROBLEMS.table([problem]), sampler, None, PromptConfig(), SamplingConfig(), 1, 0
    )
    return validate(table, ROLLOUTS).to_pylist()


def test_rows_of_a_sane_server_are_on_policy_and_spelled_by_their_ids(scripted):
    scripted.body = body(message={"content": "anything else"}, token_ids=[40, 41])
    (row,) = rollouts(scripted)
    table = byte_table(load_tokenizer(resolve_policy("micro")))
    assert (row["on_policy"], row["response"]) == (True, table.text([40, 41]))


def test_a_sampler_refuses_ids_that_its_model_does_not_know(scripted):
    known = vocab_size(resolve_policy("micro"))
    scripted.body = body(token_ids=[4, known - 1])
    assert rollouts(scripted)[0]["on_policy"]
    scripted.body = body(token_ids=[4, known])
    with pytest.raises(InputError, match=f"{scripted.url}: sends token_ids outside the vocabulary"):
        rollouts(scripted)


def test_a_response_without_its_prompts_ids_is_not_on_policy(scripted):
    scripted.body = body(prompt=[])
    (row,) = rollouts(scripted)
    assert (row["on_policy"], row["token_ids"], row["logprobs"]) == (False, [], [])
