"""The same command asks again for rows that an endpoint left unanswered, and for nothing else."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trace_opd.data.store import Store
from trace_opd.pipelines.cli.commands import app
from trace_opd.pipelines.paid.prices import Price
from trace_opd.pipelines.pipeline import run_stage
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator
from trace_opd.schemas.errors import InputError, TooManyFailed
from trace_opd.tests.pipelines.conftest import PaidServer, completion

PRICE = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}


def config(url: str, **changes: Any) -> AnnotateConfig:
    fields = {"engine": "openai", "base_url": url, "model": "m", "api_key_env": None}
    return AnnotateConfig(annotator=OpenAIAnnotator(**fields | {"max_attempts": 1} | changes))


def failing(server: PaidServer, status: int, *rows: int) -> None:
    """The server fails questions about these rows."""

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if any(f"Pens: {row}." in body["messages"][1]["content"] for row in rows):
            return status, {"error": {"message": "not now"}}
        return completion(body)

    server.answer = answer


def annotate(store: Store, url: str, **changes: Any):
    try:
        return run_stage("annotate", config(url, **{"max_failed_share": 1.0} | changes), store)
    finally:
        close_engine()


@pytest.mark.parametrize("batch", [False, True])
def test_the_same_command_asks_again_for_what_was_left_unanswered(
    tmp_path: Path, paid_server, make_verdicts, batch: bool
):
    changes = {"batch": True, "batch_poll_s": 0.01} if batch else {}
    store = make_verdicts(tmp_path, parts=2, count=5)
    failing(paid_server, 500, 3, 7)
    first: Any = annotate(store, paid_server.url, **changes)
    assert first.summary["status"] == {"ok": 8, "failed": 2}
    assert first.summary["unanswered"] == 2
    failing(paid_server, 500, 7)
    second: Any = annotate(store, paid_server.url, **changes)
    failing(paid_server, 500)
    third: Any = annotate(store, paid_server.url, **changes)
    assert annotate(store, paid_server.url, **changes).id == third.id  # type: ignore[union-attr]
    assert len({first.id, second.id, third.id}) == 3
    assert store.get("annotations").id == third.id
    assert [made.summary.get("attempt") for made in (first, second, third)] == [None, 1, 2]
    assert third.summary["status"] == {"ok": 10}
    assert store.get(first.ref).summary["status"] == {"ok": 8, "failed": 2}  # as it was
    assert set(Counter(map(json.dumps, paid_server.answered)).values()) == {1}
    journals = {path.parent.parent.name for path in tmp_path.glob("annotate/*/journal/*.jsonl")}
    assert journals == {first.id}


def test_refused_and_invalid_rows_are_not_asked_again(tmp_path: Path, paid_server, make_verdicts):
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        said = body["messages"][1]["content"]
        if "Pens: 1." in said:
            return 400, {"error": {"message": "flagged"}}
        return completion(body, "Segment 1.") if "Pens: 2." in said else completion(body)

    paid_server.answer = answer
    store = make_verdicts(tmp_path, parts=1, count=6)
    first: Any = annotate(store, paid_server.url)
    assert first.summary["status"] == {"ok": 4, "failed": 1, "invalid": 1}
    asked = len(paid_server.chats)
    again: Any = annotate(store, paid_server.url)
    assert (again.id, len(paid_server.chats)) == (first.id, asked)


def test_keep_failed_asks_nothing_again(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path, parts=1, count=5)
    failing(paid_server, 503, 3)
    first: Any = annotate(store, paid_server.url)
    asked = len(paid_server.chats)
    kept: Any = annotate(store, paid_server.url, keep_failed=True, max_failed_share=0.0)
    assert (kept.id, len(paid_server.chats)) == (first.id, asked)


def test_attempts_share_one_budget(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path, parts=1, count=8)
    failing(paid_server, 504, 3)  # it may have been billed
    annotate(store, paid_server.url, budget_usd=1.0, **PRICE)
    failing(paid_server, 500)
    billed = sum(
        Price(prompt=1.0, completion=2.0).worst_case_usd(b) for b in paid_server.chats[-1:]
    )
    with pytest.raises(InputError, match="has no room"):
        annotate(store, paid_server.url, budget_usd=1.5 * billed, **PRICE)
    assert len(paid_server.chats) == 8
    assert annotate(store, paid_server.url, budget_usd=1.0, **PRICE).summary["status"] == {"ok": 8}  # type: ignore[union-attr]


def test_too_many_failures_end_the_command_with_exit_code_1(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=1, count=10)
    failing(paid_server, 500, 3)
    with pytest.raises(
        TooManyFailed, match=r"1 of 10 rows failed.*run the same command again"
    ) as e:
        annotate(store, paid_server.url, max_failed_share=0.05)
    assert e.value.exit_code == 1
    assert store.get("annotations").summary["status"] == {"ok": 9, "failed": 1}  # finished, named
    arguments = [
        "annotate", "annotator.engine=openai", "annotator.model=m", "annotator.api_key_env=null",
        f"annotator.base_url={paid_server.url}", "--store", str(tmp_path),
    ]  # fmt: skip
    kept = CliRunner().invoke(app, [*arguments, "--keep-failed"])
    assert kept.exit_code == 0, kept.output
    failing(paid_server, 500)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert store.get("annotations").summary["status"] == {"ok": 10}
    assert len(paid_server.chats) == 11


def test_earlier_datasets_stay_and_new_ones_use_the_next_attempt(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=1, count=4)
    failing(paid_server, 500, 3)
    first: Any = annotate(store, paid_server.url)
    draft: Any = store.begin("convert", {}, {"annotations": first}, None)
    failing(paid_server, 500)
    second: Any = annotate(store, paid_server.url)
    follower = store.begin("convert", {}, {"annotations": store.get("annotations")}, None)
    assert (second.id != first.id, follower.id != draft.id) == (True, True)


@pytest.fixture(autouse=True)
def _engine_closed():
    yield
    close_engine()
