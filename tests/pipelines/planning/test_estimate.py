"""A dry run tells requests, tokens and cost, and sends nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trace_opd.data.store import Draft, Store
from trace_opd.pipelines.cli.stage_plan import show_plan
from trace_opd.pipelines.planning.estimate import Estimate, estimate
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator
from trace_opd.schemas.errors import InputError

PRICES = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}


def config(url: str, **changes) -> AnnotateConfig:
    fields = {"engine": "openai", "base_url": url, "model": "m", "api_key_env": None}
    return AnnotateConfig(annotator=OpenAIAnnotator(**fields | PRICES | changes))


def found(request: AnnotateConfig, store: Store) -> Estimate:
    plan, draft = ANNOTATE_STAGE.begin(request, store)
    assert isinstance(draft, Draft)
    out = estimate(plan, draft)
    assert out is not None
    return out


def shown(request: AnnotateConfig, store: Store) -> str:
    console = Console(record=True, width=160)
    show_plan("annotate", request, store, console)
    return console.export_text()


def costs(text: str) -> tuple[str, ...] | None:
    """Expected, one full answer each, at most; None without such a line."""
    line = re.search(r"^ *cost +(\S+) +(\S+) +(\S+) *$", text, re.MULTILINE)
    return None if line is None else line.groups()


def files(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*")}


def stopped_run(request: AnnotateConfig, store: Store, parts: int) -> None:
    """The first parts of a run, as a kill between two parts leaves them."""
    plan, draft = ANNOTATE_STAGE.begin(request, store)
    assert isinstance(draft, Draft)
    for part in range(parts):
        ANNOTATE_STAGE.make_part(plan, draft, part)
    close_engine()


def test_a_dry_run_sends_nothing_and_writes_nothing(
    tmp_path: Path, paid_server, make_verdicts, capsys
):
    store = make_verdicts(tmp_path, parts=2, count=10, unscored=3)
    before = files(tmp_path)
    text = shown(config(paid_server.url, budget_usd=3.0), store)
    assert not paid_server.asked
    assert files(tmp_path) == before
    assert "20 rows to make: 14 ask, 0 find" in text
    assert "6 have no verdict" in text
    assert "Budget: $3.0000" in text
    expected, *limits = costs(text) or ()
    assert expected == "unknown"  # nothing has been answered yet
    full, most = (float(cell.removeprefix("$")) for cell in limits)
    assert 14 * 512 * 2.0 / 1e6 < full < most


def test_an_unknown_price_is_said(tmp_path: Path, paid_server, make_verdicts):
    store = make_verdicts(tmp_path, parts=1, count=2)
    unknown: dict[str, Any] = dict.fromkeys(PRICES)
    text = shown(config(paid_server.url, **unknown), store)
    assert costs(text) == ("unknown", "unknown", "unknown")
    with pytest.raises(InputError, match="price of model m"):
        shown(config(paid_server.url, budget_usd=1.0, **unknown), store)


def test_what_is_made_or_journalled_is_free_and_tells_what_the_rest_will_take(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=4, count=10)
    request = config(paid_server.url)
    first = found(request, store)
    assert (first.rows, first.asked, first.answered, first.seen) == (40, 40, 0, 0)
    assert first.expected is None
    stopped_run(request, store, parts=2)
    (part,) = tmp_path.glob("annotate/*/part-00001.parquet")
    part.unlink()  # its answers are in the journal
    rest = found(request, store)
    assert (rest.rows, rest.asked, rest.answered, rest.seen) == (30, 20, 10, 20)
    sent = len(paid_server.chats)
    dataset = ANNOTATE_STAGE.run(request, store)
    assert len(paid_server.chats) - sent == rest.asked
    assert rest.expected is not None
    assert rest.expected.prompt == pytest.approx(dataset.summary["prompt_tokens"] / 2, rel=0.02)
    assert rest.expected.completion == pytest.approx(dataset.summary["completion_tokens"] / 2)
    assert rest.full.prompt == pytest.approx(dataset.summary["prompt_tokens"] / 2, rel=0.02)


def test_no_run_takes_more_than_at_most(tmp_path: Path, paid_server, make_verdicts):
    told = paid_server.answer

    def worst(body: dict) -> tuple[int, dict]:
        """Cut at the limit, then invalid at every turn, a token per byte of the prompt."""
        _, said = told(body)
        limit = body["max_tokens"]
        finish = "length" if limit == 16 else "stop"
        said["choices"][0] |= {"message": {"content": "no" * (limit // 2)}, "finish_reason": finish}
        prompt = sum(len(message["content"].encode()) for message in body["messages"])
        said["usage"] = {"prompt_tokens": prompt, "completion_tokens": limit}
        return 200, said

    paid_server.answer = worst
    store = make_verdicts(tmp_path, parts=1, count=5)
    request = config(paid_server.url, max_new_tokens=16, corrective_turns=2)
    most = found(request, store).most
    dataset = ANNOTATE_STAGE.run(request, store)
    assert dataset.summary["status"] == {"invalid": 5}
    assert len(paid_server.chats) == 5 * 4
    assert dataset.summary["completion_tokens"] == most.completion
    assert 0.5 * most.prompt < dataset.summary["prompt_tokens"] <= most.prompt


def test_a_policy_that_annotates_itself_has_requests_and_tokens_but_no_cost(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=1, count=6)
    request = AnnotateConfig.model_validate(
        {
            "annotator": {
                "engine": "self",
                "policy": {"path": "mine"},
                "sampler": {"engine": "openai", "base_url": paid_server.url, "api_key_env": None},
            }
        }
    )
    text = shown(request, store)
    assert "6 rows to make: 6 ask" in text
    assert "completion tokens" in text
    assert costs(text) is None
    assert "Budget" not in text
    assert not paid_server.chats


def test_an_engine_that_asks_nobody_has_no_estimate(tmp_path: Path, make_verdicts):
    store = make_verdicts(tmp_path, parts=1, count=2)
    request = AnnotateConfig.model_validate({"annotator": {"engine": "none"}})
    plan, draft = ANNOTATE_STAGE.begin(request, store)
    assert isinstance(draft, Draft)
    assert estimate(plan, draft) is None


@pytest.fixture(autouse=True)
def _engine_closed():
    yield
    close_engine()
