"""Equal responses are asked, paid and counted once, and what has no answer is named."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trace_opd.data.store import Draft
from trace_opd.pipelines import endpoint
from trace_opd.pipelines.cli.show import show_dataset
from trace_opd.pipelines.paid.bill import read_bill
from trace_opd.pipelines.paid.prices import Price
from trace_opd.pipelines.planning.estimate import estimate
from trace_opd.pipelines.progress import Meter, progress_bar
from trace_opd.pipelines.stages import annotate, base
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator
from trace_opd.tests.pipelines.conftest import completion

PRICE = Price(prompt=1.0, completion=2.0)
NUMBERS = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}


def config(url: str, **changes: Any) -> AnnotateConfig:
    fields = {"engine": "openai", "base_url": url, "model": "m", "api_key_env": None}
    return AnnotateConfig(annotator=OpenAIAnnotator(**fields | NUMBERS | changes))


def bill(body: dict[str, Any]) -> float:
    """What the server bills for its answer to a request."""
    usage = completion(body)[1]["usage"]
    return PRICE.of_tokens(usage["prompt_tokens"], usage["completion_tokens"])


@pytest.mark.parametrize("changes", [{}, {"batch": True, "batch_poll_s": 0.01}])
@pytest.mark.parametrize("finished", [(), (0, 1), (1, 2)])
def test_rows_with_equal_responses_share_one_answer_and_one_bill(
    tmp_path: Path, paid_server, make_verdicts, monkeypatch, changes: dict, finished: tuple
):
    """finished: parts that an earlier run has made."""

    def answer(body: dict) -> tuple[int, dict]:  # one response takes a corrective turn
        hard = "Pens: 1." in body["messages"][1]["content"] and len(body["messages"]) == 2
        return completion(body, "no") if hard else completion(body)

    paid_server.answer = answer
    store = make_verdicts(tmp_path, parts=3, count=8, distinct=5)
    request = config(paid_server.url, **changes)
    shown: dict[str, object] = {}
    monkeypatch.setattr(annotate, "show_fields", lambda **fields: shown.update(fields))
    meters: list[Meter] = []

    @contextmanager
    def seen(*about: Any, **more: Any) -> Iterator[Meter]:
        with progress_bar(*about, **more) as meter:
            meters.append(meter)
            yield meter

    monkeypatch.setattr(base, "progress_bar", seen)
    plan, draft = annotate.STAGE.begin(request, store)
    assert isinstance(draft, Draft)
    before = estimate(plan, draft)
    assert before is not None
    assert (before.rows, before.asked, before.shared) == (24, 5, 19)
    for part in range(3) if finished else ():
        annotate.STAGE.make_part(plan, draft, part)
    close_engine()
    for part in {0, 1, 2}.difference(finished) if finished else ():
        draft.local_path(f"part-0000{part}.parquet").unlink()
    dataset = annotate.STAGE.run(request, store)
    assert len(paid_server.answered) == 5 + 1
    billed = sum(map(bill, paid_server.answered)) * (PRICE.batch if changes else 1)
    rows = dataset.read().to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["cost_usd"] > 0 for row in rows] == [True] * 5 + [False] * 19
    assert sum(row["cost_usd"] for row in rows) == pytest.approx(billed)
    assert dataset.summary["cost_usd"] == pytest.approx(billed)
    assert dataset.summary["spent_usd"] == pytest.approx(billed)
    assert shown["cost"] == f"${billed:.6f}"
    assert (meters[-1].done, meters[-1].total) == (24, 24)
    assert dataset.summary["rows_sharing_an_answer"] == 19
    assert dataset.summary["cost_usd_per_row_median"] > 0
    assert dataset.summary["requests"] == {"answered": 6}


def test_another_dataset_pays_nothing_for_answers_that_it_finds(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=1, count=6, distinct=4)
    first = annotate.STAGE.run(config(paid_server.url), store)
    again = annotate.STAGE.run(config(paid_server.url, name="again"), store)
    assert len(paid_server.answered) == 4
    assert again.summary["cost_usd"] == first.summary["cost_usd"] == first.summary["spent_usd"]
    assert again.summary["spent_usd"] == 0
    assert again.summary["requests"] == {"answered": 0}


@pytest.mark.parametrize("changes", [{"budget_usd": 5.0}, {}])
def test_requests_without_an_answer_are_named_and_never_called_spent(
    tmp_path: Path, paid_server, make_verdicts, monkeypatch, changes: dict
):
    monkeypatch.setattr(endpoint, "wait_s", lambda state: 0.0)
    lost: list[dict] = []
    seen: set[str] = set()

    def answer(body: dict) -> tuple[int, Any]:
        text = body["messages"][1]["content"]
        number = text.split("Pens: ")[1][0]
        first = number not in seen
        seen.add(number)
        if number in "03" and first:  # answered at the second attempt
            lost.append(body)
            if changes or number == "3":
                return 504, {"error": {"message": "late"}}
            time.sleep(1.5)
        if number == "1":
            return 400, {"error": {"message": "no"}}
        if number == "2":  # a page in place of a completion, each time
            lost.append(body)
            return 200, b"<html>busy</html>"
        return completion(body)

    paid_server.answer = answer
    store = make_verdicts(tmp_path, parts=1, count=6)
    request = config(paid_server.url, timeout_s=1.0, max_attempts=2, concurrency=1,
                     max_failed_share=1.0, **changes)  # fmt: skip
    dataset = annotate.STAGE.run(request, store)
    summary = dataset.summary
    assert summary["status"] == {"ok": 4, "failed": 2}
    assert summary["requests"] == {
        "answered": 4, "refused": 1, "timed out": 2, "unparsable": 2, "retried": 3,
        "possibly billed": 4,
    }  # fmt: skip
    assert summary["spent_usd"] == summary["cost_usd"]
    possibly = sum(map(PRICE.worst_case_usd, lost))
    assert summary["possibly_billed_usd"] == pytest.approx(possibly)
    console = Console(record=True, width=160)
    show_dataset(dataset, console)
    assert "2 timed out, 2 unparsable, 3 retried, 4 possibly billed" in console.export_text()
    (journal,) = tmp_path.glob("annotate/*/journal")
    assert read_bill(journal, PRICE).spent_usd == pytest.approx(summary["cost_usd"])


@pytest.fixture(autouse=True)
def _engine_closed():
    yield
    close_engine()
