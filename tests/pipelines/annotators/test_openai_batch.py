"""Annotation by the Batch API against a loopback server, with the real client."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from trace_opd.data.store import Dataset, Store
from trace_opd.pipelines.annotators.batch_jobs import read_jobs
from trace_opd.pipelines.cli.batches import batches_table
from trace_opd.pipelines.paid.prices import Price
from trace_opd.pipelines.paid.spending import open_spending
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator
from trace_opd.schemas.errors import InputError

KEY = "sk-planted-0123456789"
PRICE = Price(prompt=1.0, completion=2.0, batch=0.5)


def config(url: str, **changes) -> AnnotateConfig:
    fields = {
        "engine": "openai", "base_url": url, "model": "m", "api_key_env": None, "batch": True,
        "batch_poll_s": 0.01, "max_new_tokens": 64, "max_attempts": 2,
    }  # fmt: skip
    return AnnotateConfig(annotator=OpenAIAnnotator(**fields | changes))


def priced(tmp_path: Path, url: str, **changes) -> AnnotateConfig:
    host = url.removeprefix("http://").removesuffix("/v1")
    path = tmp_path / "prices.yaml"
    listed = {
        "as_of": "2026-01-01",
        "source": "https://example.org",
        "models": {"m": PRICE.model_dump()},
    }
    path.write_text(json.dumps({host: listed}))  # JSON is YAML
    return config(url, prices=str(path), **changes)


def run(request: AnnotateConfig, store: Store) -> Dataset:
    try:
        return ANNOTATE_STAGE.run(request, store)
    finally:
        close_engine()


def questions(server) -> Counter[str]:
    """How many answers each first question got."""
    firsts = [body for body in server.answered if len(body["messages"]) == 2]
    return Counter(body["messages"][1]["content"] for body in firsts)


def jobs(tmp_path: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in tmp_path.glob("annotate/*/batches/*.json")]


def test_all_parts_go_out_in_one_batch_at_the_batch_price(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=3, count=4, unscored=1)
    dataset = run(priced(tmp_path, paid_server.url), store)
    assert dataset.summary["status"] == {"ok": 9, "skipped": 3}
    assert (len(paid_server.batches), paid_server.uploads, len(paid_server.chats)) == (1, 1, 0)
    assert set(questions(paid_server).values()) == {1}
    tokens = dataset.summary["prompt_tokens"], dataset.summary["completion_tokens"]
    assert dataset.summary["cost_usd"] == pytest.approx(PRICE.of_tokens(*tokens) / 2)
    assert dataset.summary["latency_s_median"] == 60.0  # the batch's latency
    assert paid_server.authorization == {None}
    assert [job["status"] for job in jobs(tmp_path)] == ["collected"]


def test_questions_are_split_at_the_limit_of_requests(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path, parts=2, count=5)
    run(config(paid_server.url, batch_requests=4), store)
    sizes = [batch["request_counts"]["total"] for batch in paid_server.batches.values()]
    assert sizes == [4, 4, 2]


def test_an_invalid_answer_is_corrected_in_a_further_batch(
    tmp_path: Path, paid_server, make_verdicts
):
    valid = paid_server.answer

    def first_wrong(body: dict) -> tuple[int, dict]:
        status, reply = valid(body)
        if len(body["messages"]) == 2 and "Pens: 1." in body["messages"][1]["content"]:
            reply["choices"][0]["message"]["content"] = "Segment 1."
        return status, reply

    paid_server.answer = first_wrong
    store = make_verdicts(tmp_path, parts=1, count=3)
    dataset = run(config(paid_server.url), store)
    assert dataset.summary["status"] == {"ok": 3}
    assert [b["request_counts"]["total"] for b in paid_server.batches.values()] == [3, 1]


def test_a_request_that_fails_is_a_failed_row_and_not_asked_again(
    tmp_path: Path, paid_server, make_verdicts
):
    valid = paid_server.answer

    def unlucky(body: dict) -> tuple[int, dict]:
        if "Pens: 2." in body["messages"][1]["content"]:
            return 400, {"error": {"message": "flagged", "code": "content_policy"}}
        return valid(body)

    paid_server.answer = unlucky
    store = make_verdicts(tmp_path, parts=2, count=2)
    rows = run(config(paid_server.url), store).read().to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    assert "flagged" in rows[2]["error"]
    assert len(paid_server.batches) == 1


def test_more_than_half_of_the_requests_failing_stops(tmp_path: Path, paid_server, make_verdicts):
    paid_server.answer = lambda body: (400, {"error": {"message": "no such thing"}})
    store = make_verdicts(tmp_path, parts=1, count=3)
    with pytest.raises(InputError, match=r"3 requests failed .*no such thing"):
        run(config(paid_server.url), store)


def test_a_refused_parameter_is_left_out_in_the_next_batch(
    tmp_path: Path, paid_server, make_verdicts
):
    valid = paid_server.answer

    def modern(body: dict) -> tuple[int, dict]:
        if "max_tokens" in body:
            reply = "Unsupported parameter: 'max_tokens' is not supported with this model."
            return 400, {"error": {"message": reply, "param": "max_tokens"}}
        return valid(body)

    paid_server.answer = modern
    store = make_verdicts(tmp_path, parts=1, count=3)
    assert run(config(paid_server.url), store).summary["status"] == {"ok": 3}
    assert len(paid_server.batches) == 2
    assert all("max_completion_tokens" in body for body in paid_server.answered)


def test_an_expired_batch_is_reported_and_only_its_rest_is_asked_again(
    tmp_path: Path, paid_server, make_verdicts
):
    paid_server.final = "expired"
    store = make_verdicts(tmp_path, parts=1, count=6)
    with pytest.raises(
        InputError, match=r"batch-0 is expired with 3 of 6 answers; .*not paid again"
    ):
        run(config(paid_server.url), store)
    paid_server.final = "completed"
    assert run(config(paid_server.url), store).summary["status"] == {"ok": 6}
    assert paid_server.batches["batch-1"]["request_counts"]["total"] == 3
    assert set(questions(paid_server).values()) == {1}


def test_a_failed_batch_is_reported_with_its_reason(tmp_path: Path, paid_server, make_verdicts):
    paid_server.final, paid_server.fault = "failed", "Enqueued token limit reached"
    store = make_verdicts(tmp_path, parts=1, count=2)
    with pytest.raises(
        InputError, match=r"is failed with 0 of 2 answers \(RequestFailed: Enqueued token limit"
    ):
        run(config(paid_server.url), store)


def test_either_engine_finds_the_others_answers_at_the_price_they_had(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=1, count=4)
    request = priced(tmp_path, paid_server.url)
    cost = run(request, store).summary["cost_usd"]
    for made in (
        *tmp_path.glob("annotate/*/*.parquet"),
        *tmp_path.glob("annotate/*/manifest.json"),
    ):
        made.unlink()
    one_by_one = run(priced(tmp_path, paid_server.url, batch=False), store)
    assert not paid_server.chats
    assert one_by_one.summary["cost_usd"] == pytest.approx(cost)


def test_answers_that_were_asked_one_by_one_are_not_in_a_batch(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=2, count=4)
    plan, draft = ANNOTATE_STAGE.begin(config(paid_server.url, batch=False), store)
    assert not isinstance(draft, Dataset)
    ANNOTATE_STAGE.make_part(plan, draft, 0)
    close_engine()
    (tmp_path / draft.ref / "part-00000.parquet").unlink()
    run(config(paid_server.url), store)
    assert len(paid_server.chats) == 4
    assert paid_server.batches["batch-0"]["request_counts"]["total"] == 4
    assert set(questions(paid_server).values()) == {1}


_RUN_STAGE = """
import sys
from trace_opd.data.store import Store
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.schemas.configs import AnnotateConfig
ANNOTATE_STAGE.run(AnnotateConfig.model_validate_json(sys.argv[1]), Store(sys.argv[2]))
"""


def test_a_run_killed_while_polling_finds_its_batch_again(
    tmp_path: Path, paid_server, make_verdicts
):
    paid_server.polls = 10**9
    store = make_verdicts(tmp_path, parts=2, count=3)
    request = config(paid_server.url)
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN_STAGE, request.model_dump_json(), str(tmp_path)]
    )
    deadline = time.monotonic() + 60
    while paid_server.polled < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(paid_server.batches) == 1
    paid_server.polls = 0
    assert run(request, store).summary["status"] == {"ok": 6}
    assert (len(paid_server.batches), paid_server.uploads) == (1, 1)
    assert set(questions(paid_server).values()) == {1}


@pytest.mark.parametrize("forgotten", [("batch_id",), ("batch_id", "input_file_id")])
def test_a_run_killed_before_it_remembered_a_step_submits_nothing_twice(
    tmp_path: Path, paid_server, make_verdicts, forgotten, monkeypatch
):
    """Like a kill between a request to the server and the write of its reply."""
    store = make_verdicts(tmp_path, parts=1, count=3)
    with monkeypatch.context() as stopping:

        def stop(self, job) -> None:
            raise KeyboardInterrupt

        stopping.setattr("trace_opd.pipelines.annotators.batch_client.BatchClient.refresh", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config(paid_server.url), store)
    (path,) = tmp_path.glob("annotate/*/batches/*.json")
    job = json.loads(path.read_text())
    path.write_text(json.dumps(job | dict.fromkeys(forgotten)))
    path.with_suffix(".jsonl").write_bytes(paid_server.files["file-0"])
    if "input_file_id" in forgotten:  # then no batch can exist
        paid_server.batches.clear()
    assert run(config(paid_server.url), store).summary["status"] == {"ok": 3}
    assert len(paid_server.batches) == 1
    assert set(questions(paid_server).values()) == {1}


def test_a_budget_limits_what_a_round_may_cost(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path, parts=2, count=10)
    with pytest.raises(InputError, match=r"has no room .*raise annotator\.budget_usd"):
        run(priced(tmp_path, paid_server.url, budget_usd=0.006), store)
    assert len(paid_server.batches) > 1  # settled answers release money for more
    usages = [paid_server.answer(body)[1]["usage"] for body in paid_server.answered]
    paid = sum(PRICE.of_tokens(u["prompt_tokens"], u["completion_tokens"]) / 2 for u in usages)
    assert 0.003 < paid <= 0.006
    dataset = run(priced(tmp_path, paid_server.url, budget_usd=1.0), store)
    assert dataset.summary["status"] == {"ok": 20}
    assert set(questions(paid_server).values()) == {1}


def test_answers_without_usage_count_as_their_worst_case_in_later_runs_too(
    tmp_path: Path, paid_server, make_verdicts
):
    original = paid_server.answer

    def silent(body: dict) -> tuple[int, dict]:
        status, reply = original(body)
        if "Pens: 1." in body["messages"][1]["content"]:
            reply["choices"] = []  # billed, but empty
        return status, reply | {"usage": None}

    paid_server.answer = silent
    store = make_verdicts(tmp_path, parts=1, count=8)
    request = priced(tmp_path, paid_server.url, budget_usd=0.006)
    with pytest.raises(InputError, match=r"has no room .*raise annotator\.budget_usd"):
        run(request, store)
    (journal,) = tmp_path.glob("annotate/*/journal")
    worst = sum(PRICE.worst_case_usd(body, batched=True) for body in paid_server.answered)
    with closing(open_spending(request.annotator, journal)) as spending:  # type: ignore[arg-type]
        assert spending.budget is not None
        gone = spending.budget.spent_usd + spending.budget.possibly_usd
        assert gone == pytest.approx(worst)
    assert 0.003 < worst <= 0.006


def listed(store: Store, cancel: bool = False) -> str:
    console = Console(record=True, width=160)
    console.print(batches_table([store], cancel))
    return console.export_text()


def test_open_batches_are_listed_and_cancelled_and_what_they_answered_is_kept(
    tmp_path: Path, paid_server, make_verdicts, monkeypatch
):
    store = make_verdicts(tmp_path, parts=1, count=6)
    monkeypatch.setenv("TEST_KEY", KEY)
    request = config(paid_server.url, api_key_env="TEST_KEY")
    with monkeypatch.context() as stopping:
        stopping.setattr("time.sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(request, store)
    paid_server.polls = 10**9
    assert re.search(r"annotate/\w+ +batch-0 +in_progress +0/6", listed(store))
    with pytest.raises(InputError, match="1 batches of its questions are out"):
        run(config(paid_server.url, api_key_env="TEST_KEY", batch=False), store)
    assert "cancelling" in listed(store, cancel=True)
    with pytest.raises(InputError, match="batch-0 is cancelled with 3 of 6 answers"):
        run(request, store)
    assert "batch-0" not in listed(store)
    dataset = run(config(paid_server.url, api_key_env="TEST_KEY", batch=False), store)
    assert dataset.summary["status"] == {"ok": 6}
    assert len(paid_server.chats) == 3
    assert paid_server.authorization == {f"Bearer {KEY}"}
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if KEY.encode() in path.read_bytes()]


def test_a_server_that_sends_the_key_back_gets_it_nowhere(
    tmp_path: Path, paid_server, make_verdicts, monkeypatch
):
    valid = paid_server.answer

    def echoing(body: dict) -> tuple[int, dict]:
        if "Pens: 0." in body["messages"][1]["content"]:
            return 400, {"error": {"message": f"not for {KEY}"}}
        status, reply = valid(body)
        if "Pens: 1." in body["messages"][1]["content"]:
            reply["choices"][0]["message"]["content"] = KEY
        return status, reply

    paid_server.answer = echoing
    monkeypatch.setenv("TEST_KEY", KEY)
    store = make_verdicts(tmp_path, parts=1, count=5)
    dataset = run(config(paid_server.url, api_key_env="TEST_KEY"), store)
    assert dataset.summary["status"] == {"ok": 3, "failed": 2}
    assert "sends the API key back" in dataset.read().to_pylist()[1]["error"]
    paid_server.final, paid_server.fault = "failed", f"no credit on {KEY}"
    with pytest.raises(InputError, match=r"no credit on \*\*\*"):
        run(config(paid_server.url, api_key_env="TEST_KEY", temperature=0.5), store)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if KEY.encode() in path.read_bytes()]


def test_a_file_of_requests_without_a_job_is_removed(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path, parts=1, count=1)
    draft = ANNOTATE_STAGE.begin(config(paid_server.url), store)[1]
    assert not isinstance(draft, Dataset)
    folder = draft.local_path("batches")
    (folder / "torn.jsonl").write_text("{")
    run(config(paid_server.url), store)
    assert read_jobs(folder) == []
    assert not list(folder.glob("*.jsonl"))
