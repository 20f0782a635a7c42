"""Engine vllm against a server of vLLM's protocol: the same scores as a local teacher's, and every
fault of a server in one sentence."""

import copy
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trace_opd.data.store import Store
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.scoring.engine import Scored
from trace_opd.pipelines.scoring.local import LocalEngine
from trace_opd.pipelines.scoring.vllm import VllmEngine
from trace_opd.schemas.configs import ScoreConfig, VllmTeacher
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import ROUTED


def teacher(*servers, **fields) -> VllmTeacher:
    urls = [server.url for server in servers]
    given: dict[str, Any] = {"timeout_s": 5.0} | fields
    return VllmTeacher(engine="vllm", base_url=urls, model="teacher", **given)


def score(vocabulary, sequences, *servers, k=4, **fields) -> list[Scored]:
    config = ScoreConfig(teacher=teacher(*servers, **fields), k=k, temperature=1)
    return VllmEngine(config).open(vocabulary).score(sequences)


@pytest.mark.parametrize("k", [1, 4])
def test_the_scores_are_those_of_a_local_teacher(vocabulary, sequences, served, k):
    served_scores = score(vocabulary, sequences, served, k=k)
    config = ScoreConfig(k=k, temperature=1)
    local = LocalEngine(config).open(vocabulary).score(sequences)
    sampled_among = 0
    for own, other, sequence in zip(served_scores, local, sequences, strict=True):
        np.testing.assert_allclose(own.top_logprobs, other.top_logprobs, atol=1e-4)
        assert np.mean(own.token_ids == other.token_ids) > 0.99  # but for ties
        np.testing.assert_allclose(np.exp(own.tail), np.exp(other.tail), atol=1e-5)
        np.testing.assert_allclose(own.logprobs, other.logprobs, atol=1e-4)
        assert own.teacher_entropy is None
        ids = sequence.token_ids[sequence.routed_positions]
        sampled_among += np.count_nonzero((own.token_ids == ids[:, None]).any(1))
    # Entries of k tokens were read, and with k = 1 some of k + 1.
    assert sampled_among > 0
    assert (k == 1) == (sampled_among < sum(len(one.tail) for one in local))


def test_a_request_is_the_teachers_prompt_and_the_response_up_to_its_last_routed_token(
    vocabulary, sequences, served
):
    score(vocabulary, sequences[:3], served, concurrency=1)
    assert served.paths == {"/v1/completions"}
    for request, one in zip(served.requests, sequences, strict=False):
        response = one.token_ids[: one.routed_end].tolist()
        assert request == {
            "model": "teacher", "prompt": [*one.teacher_prompt_ids, *response],
            "prompt_logprobs": 4, "max_tokens": 1, "temperature": 1.0, "stream": False,
        }  # fmt: skip


def test_at_most_concurrency_requests_are_in_flight(vocabulary, sequences, served):
    score(vocabulary, sequences, served, concurrency=2)
    assert served.most_in_flight <= 2
    assert len(served.requests) == len(sequences)


def test_the_whole_vocabulary_leaves_no_tail(vocabulary, sequences, served):
    served.cap = 10**6
    (scored,) = score(vocabulary, sequences[:1], served, k=10**6)
    assert served.requests[0]["prompt_logprobs"] == vocabulary.size
    assert set(scored.tail.tolist()) == {-9999.0}


def test_transient_failures_are_retried(vocabulary, sequences, served, caplog):
    caplog.set_level(logging.WARNING)
    busy = {"error": {"message": "overloaded"}}
    answers = {0: (503, busy), 1: (200, b"<html>gateway</html>"), 2: (429, busy)}
    served.answer = lambda n, body: answers.get(n) or served.honest(body)
    (scored,) = score(vocabulary, sequences[:1], served, timeout_s=60.0)
    assert len(served.requests) == 4
    assert len(caplog.records) == 3
    assert len(scored.tail) == len(sequences[0].routed_positions)


def test_a_server_that_fails_leaves_its_requests_to_another(vocabulary, sequences, served, second):
    served.answer = lambda n, body: (500, {"error": {"message": "broken"}})
    both = score(vocabulary, sequences, served, second, concurrency=2)  # the first to each
    assert len(served.requests) == 1
    alone = score(vocabulary, sequences, second, concurrency=1)
    for left, right in zip(both, alone, strict=True):
        np.testing.assert_array_equal(left.top_logprobs, right.top_logprobs)


def test_the_key_is_sent_and_never_shown(vocabulary, sequences, served, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    score(vocabulary, sequences[:1], served, api_key_env="TEACHER_KEY")
    assert served.keys == {"Bearer sk-very-secret"}
    served.answer = lambda n, body: (401, {"error": {"message": "bad key sk-very-secret"}})
    with pytest.raises(InputError, match="the API key is refused") as raised:
        score(vocabulary, sequences[:1], served, api_key_env="TEACHER_KEY")
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_more_than_the_server_allows_names_its_option(vocabulary, sequences, served):
    served.cap = 20
    with pytest.raises(InputError, match="vllm serve --max-logprobs 21, or lower k"):
        score(vocabulary, sequences, served, k=21)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, {"error": {"message": "no such model"}}), "set teacher.model to a model that it"),
        ((400, {"error": {"message": "maximum context length"}}), "refuses or fails to score"),
        ((200, {"choices": []}), "NotACompletion"),
        ((200, {"choices": [{"text": "x"}]}), "sends no prompt_logprobs"),
    ],
)
def test_a_refusal_is_one_sentence(vocabulary, sequences, served, reply, message):
    served.answer = lambda n, body: reply
    with pytest.raises(InputError, match=message) as raised:
        score(vocabulary, sequences[:1], served, timeout_s=0.5)
    assert "\n" not in str(raised.value)


def test_a_server_that_is_not_there_is_one_sentence(vocabulary, sequences, served):
    gone = copy.copy(served)
    gone.url = "http://127.0.0.1:9/v1"
    with pytest.raises(InputError, match="cannot be reached"):
        score(vocabulary, sequences[:1], gone, timeout_s=0.5)


def corrupt(change):
    """Answers whose entry at the first routed token is changed; `change` gets entry and token."""

    def answer(served, sequence):
        def reply(number, body):
            status, honest = served.honest(body)
            entries = honest["choices"][0]["prompt_logprobs"]
            place = len(sequence.teacher_prompt_ids) + int(sequence.routed_positions[0])
            change(entries, place, str(body["prompt"][place]))
            return status, honest

        return reply

    return answer


def _replace(name, value):
    def change(entries, place, token):
        entries[place][token][name] = value

    return change


def _drop_token(entries, place, token):
    del entries[place][token]


def _drop_others(entries, place, token):
    entries[place] = {token: entries[place][token]}


def _foreign(entries, place, token):
    entries[place]["100000"] = entries[place].pop(next(k for k in entries[place] if k != token))


def _no_number(entries, place, token):
    entries[place]["x"] = entries[place].pop(next(k for k in entries[place] if k != token))


def _heavy(entries, place, token):
    for one in entries[place].values():
        one["logprob"] = -0.5


def _shorter(entries, place, token):
    entries.pop()


def _null(entries, place, token):
    entries[place] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_token, "sends no log-probability of the prompt's token"),
        (_null, "sends no log-probability of the prompt's token"),
        (_drop_others, "sends another number of likeliest tokens than the 4 asked for"),
        (_foreign, "sends a token id outside the policy's 0"),
        (_no_number, "sends a token id outside the policy's 0"),
        (_heavy, "sends likeliest tokens whose probabilities sum to more than 1"),
        (_shorter, "sends prompt_logprobs of another length than the prompt's"),
        (_replace("logprob", 0.5), "sends a log-probability that is not finite or above 0"),
        (_replace("logprob", None), "sends a log-probability that is not finite or above 0"),
        (_replace("logprob", "x"), "sends a log-probability that is not finite or above 0"),
        (_replace("logprob", float("nan")), "sends a log-probability that is not finite"),
    ],
)
def test_impossible_values_stop_the_stage(vocabulary, sequences, served, change, message):
    served.answer = corrupt(change)(served, sequences[0])
    with pytest.raises(InputError, match=message):
        score(vocabulary, sequences[:1], served)


def test_a_model_of_another_vocabulary_is_seen_by_its_tokens(vocabulary, sequences, served):
    def other(number, body):
        status, reply = served.honest(body)
        for entry in filter(None, reply["choices"][0]["prompt_logprobs"]):
            for one in entry.values():
                one["decoded_token"] += "ish"
        return status, reply

    served.answer = other
    with pytest.raises(InputError, match="its model has another vocabulary than the policy"):
        score(vocabulary, sequences[:1], served)


# --- before any request ---


def routed(folder, temperature: float):
    row = {
        "rollout_id": "r", "problem_id": "p", "group_id": "g", "problem": "p",
        "prompt_token_ids": [1], "token_ids": [2], "logprobs": [-1.0], "temperature": temperature,
        "reward": 1.0, "advantage": 0.0, "correct": True, "truncated": False, "route": [0],
        "span_id": [-1], "coverage": 0.0, "dropped_tokens": 0, "policy_name": "p",
        "policy_revision": "r", "policy_step": 0, "vocab_fingerprint": "v",
    }  # fmt: skip
    draft: Any = Store(folder).begin("convert", {}, {}, ROUTED)
    draft.write_part(0, ROUTED.table([row]))
    return draft.finish(1)


def test_responses_of_another_temperature_need_a_choice(vocabulary, served, tmp_path):
    given = routed(tmp_path / "warm", 0.75)
    with pytest.raises(InputError, match=r"sampled at temperature 0.75, and a server's"):
        VllmEngine(ScoreConfig(teacher=teacher(served))).identity(vocabulary, given)
    VllmEngine(ScoreConfig(teacher=teacher(served), temperature=1.0)).identity(vocabulary, given)
    plain = routed(tmp_path / "plain", 1.0)
    identity = VllmEngine(ScoreConfig(teacher=teacher(served))).identity(vocabulary, plain)
    assert identity == {"teacher": [served.url, "teacher"]}


def test_a_model_of_another_vocabulary_is_refused_by_its_files(served, tmp_path, vocabulary):
    here = VllmTeacher(engine="vllm", base_url=served.url, model=resolve_policy("micro"))
    given = routed(tmp_path, 1.0)
    engine = VllmEngine(ScoreConfig(teacher=here))
    assert len(engine.identity(vocabulary, given)["teacher"]) == 3
    with pytest.raises(InputError, match="has another vocabulary than policy micro"):
        engine.identity(replace(vocabulary, fingerprint="another"), given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.5}, "vLLM's prompt log-probabilities are those of temperature 1"),
        ({"student": {"path": "micro"}}, "student needs the teacher's whole distribution"),
    ],
)
def test_what_a_server_cannot_give_is_refused_by_the_config(served, fields, message):
    with pytest.raises(ValueError, match=message):
        ScoreConfig(teacher=teacher(served), **fields)
