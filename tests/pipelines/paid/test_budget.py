"""A budget holds under concurrency, and a run that it stops keeps the answers it paid for."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_opd.pipelines.paid.budget import Budget, BudgetSpent
from trace_opd.pipelines.paid.prices import Price
from trace_opd.pipelines.paid.questions import Answer
from trace_opd.pipelines.paid.spending import Spending, open_spending
from trace_opd.pipelines.stages.annotate import STAGE as ANNOTATE_STAGE
from trace_opd.pipelines.stages.base import close_engine
from trace_opd.schemas.configs import AnnotateConfig, OpenAIAnnotator
from trace_opd.schemas.errors import InputError

ROUNDING = 1e-9
REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 4, allow_nan=False),  # worst case
        st.none() | st.floats(0, 1),  # the answer's cost as a share of it; None: unknown
        st.integers(0, 3),  # turns of the event loop until the answer
    ),
    max_size=40,
)


async def _ask(budget: Budget, worst: float, share: float | None, turns: int) -> float | None:
    """The request's true cost; None if it was refused."""
    try:
        async with budget.reserve(worst) as reservation:
            assert budget.spent_usd + budget.reserved_usd <= budget.limit_usd + ROUNDING
            for _ in range(turns):
                await asyncio.sleep(0)
            reservation.settle(None if share is None else worst * share)
            return worst * (1.0 if share is None else share)
    except BudgetSpent:
        return None


@given(REQUESTS, st.floats(0, 20))
@settings(deadline=None, max_examples=200)
def test_a_budget_is_never_exceeded_and_no_request_waits_forever(requests, limit: float):
    async def all_at_once() -> list[float | None]:
        return await asyncio.gather(*(_ask(budget, *request) for request in requests))

    budget = Budget(limit)
    costs = asyncio.run(asyncio.wait_for(all_at_once(), 30))
    spent = sum(cost for cost in costs if cost is not None)
    assert spent <= limit + ROUNDING
    assert budget.spent_usd == pytest.approx(spent)
    assert budget.reserved_usd == 0
    # A refused request would not have fitted with the true costs of the others.
    for (worst, _, _), cost in zip(requests, costs, strict=True):
        assert cost is not None or worst + spent > limit - ROUNDING


def test_a_budget_holds_across_threads_with_loops_of_their_own():
    budget = Budget(10.0)
    costs: list[float | None] = []

    async def many() -> list[float | None]:
        return await asyncio.gather(*(_ask(budget, 0.5, 0.6, 2) for _ in range(50)))

    threads = [threading.Thread(target=lambda: costs.extend(asyncio.run(many()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    answered = [cost for cost in costs if cost is not None]
    assert len(costs) == 200
    assert sum(answered) == pytest.approx(budget.spent_usd)
    # 0.3 each: the last one that fits is asked when at most 9.5 is spent.
    assert 9.5 < budget.spent_usd <= 10.0


def test_a_request_waits_for_those_in_flight_that_may_make_room():
    order: list[str] = []

    async def slow(budget: Budget) -> None:
        async with budget.reserve(8.0) as reservation:
            await asyncio.sleep(0.02)
            order.append("slow")
            reservation.settle(1.0)

    async def large(budget: Budget) -> None:
        await asyncio.sleep(0)  # now the other request is in flight
        async with budget.reserve(9.0):
            order.append("large")

    async def both() -> None:
        budget = Budget(10.0)
        await asyncio.gather(slow(budget), large(budget))

    asyncio.run(both())
    assert order == ["slow", "large"]


def test_a_refusal_names_limit_spent_and_reserved_amounts():
    async def spend() -> None:
        budget = Budget(1.0, spent_usd=0.25)
        async with budget.reserve(0.5):
            with pytest.raises(BudgetSpent, match=r"\$1 .*\$0\.8: \$0\.2500 .*\$0\.5000 reserved"):
                budget.take(0.8)
            assert budget.take(0.5) is None  # undecided: the request in flight may release money

    asyncio.run(spend())


def config(url: str, **changes) -> AnnotateConfig:
    return AnnotateConfig(
        annotator=OpenAIAnnotator(
            **{
                "engine": "openai",
                "base_url": url,
                "model": "m",
                "api_key_env": None,
                "usd_per_million_prompt_tokens": 1.0,
                "usd_per_million_completion_tokens": 2.0,
                "max_new_tokens": 64,
            }
            | changes
        )
    )


def paid_usd(server) -> float:
    """The cost of the server's answers at the prices of `config`."""
    price = Price(prompt=1.0, completion=2.0)
    tokens = [server.answer(body)[1]["usage"] for body in server.answered]
    return sum(price.of_tokens(t["prompt_tokens"], t["completion_tokens"]) for t in tokens)


def test_a_run_that_its_budget_stops_goes_on_when_it_is_raised_and_pays_nothing_twice(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=3, count=20)
    budget = 0.02
    with pytest.raises(
        InputError, match=r"budget of \$0\.02 has no room .*raise annotator\.budget"
    ):
        ANNOTATE_STAGE.run(config(paid_server.url, budget_usd=budget), store)
    first = len(paid_server.answered)
    assert 0 < first < 60
    assert 0.5 * budget < paid_usd(paid_server) <= budget
    with pytest.raises(InputError, match="has no room"):  # no money is left for another run
        ANNOTATE_STAGE.run(config(paid_server.url, budget_usd=budget), store)
    assert len(paid_server.answered) == first
    dataset = ANNOTATE_STAGE.run(config(paid_server.url, budget_usd=1.0), store)
    asked = [body["messages"][1]["content"] for body in paid_server.answered]
    assert (len(asked), len(set(asked))) == (60, 60)
    assert dataset.summary["status"] == {"ok": 60}
    assert dataset.summary["cost_usd"] == pytest.approx(paid_usd(paid_server))
    assert dataset.summary["budget_usd"] == 1.0
    assert [part["rows"] for part in dataset.summary["per_part"]] == [20, 20, 20]
    per_part = sum(part["cost_usd"] for part in dataset.summary["per_part"])
    assert per_part == pytest.approx(dataset.summary["cost_usd"])
    assert 0 < dataset.summary["cost_usd_per_row_median"] < dataset.summary["cost_usd"]


def test_a_budget_without_a_price_is_refused_before_the_first_request(
    tmp_path: Path, paid_server, make_verdicts
):
    store = make_verdicts(tmp_path, parts=1, count=2)
    unknown = {"usd_per_million_prompt_tokens": None, "usd_per_million_completion_tokens": None}
    with pytest.raises(InputError, match=r"unknown; set annotator\.usd_per_million_prompt_tokens"):
        ANNOTATE_STAGE.begin(config(paid_server.url, budget_usd=1.0, **unknown), store)
    assert not paid_server.chats
    assert not (tmp_path / "annotate").exists()


def test_an_answer_without_usage_counts_as_its_worst_case(
    tmp_path: Path, paid_server, make_verdicts
):
    original = paid_server.answer

    def silent(body: dict) -> tuple[int, dict]:
        status, reply = original(body)
        del reply["usage"]
        return status, reply

    paid_server.answer = silent
    store = make_verdicts(tmp_path, parts=1, count=20)
    with pytest.raises(InputError, match="has no room"):
        ANNOTATE_STAGE.run(config(paid_server.url, budget_usd=0.02, concurrency=1), store)
    worst = Price(prompt=1.0, completion=2.0).worst_case_usd(paid_server.answered[0])
    first = len(paid_server.answered)
    assert first <= 0.02 / worst
    with pytest.raises(InputError, match="has no room"):  # a later run counts it the same way
        ANNOTATE_STAGE.run(config(paid_server.url, budget_usd=0.02), store)
    assert len(paid_server.answered) == first
    ANNOTATE_STAGE.run(config(paid_server.url, budget_usd=1.0), store)
    assert len(paid_server.answered) == 20


def test_a_journal_whose_costs_are_unknown_is_refused_in_a_sentence(tmp_path: Path):
    annotator = config("http://x/v1", budget_usd=1.0).annotator
    assert isinstance(annotator, OpenAIAnnotator)
    body = {"choices": [{"message": {"content": ""}}]}
    line = {"key": "k", "record": {"latency_s": 1.0, "body": body}}
    (tmp_path / "1-a.jsonl").write_text(json.dumps(line) + "\n")
    for _ in range(2):  # the refusal releases the lock
        with pytest.raises(InputError, match=r"1-a\.jsonl: .*unknown; leave annotator\.budget_usd"):
            open_spending(annotator, tmp_path)


def test_one_process_at_a_time_spends_a_datasets_budget(tmp_path: Path):
    annotator = config("http://x/v1", budget_usd=1.0).annotator
    assert isinstance(annotator, OpenAIAnnotator)
    holder = open_spending(annotator, tmp_path)
    with pytest.raises(InputError, match="another process spends this dataset's"):
        open_spending(annotator, tmp_path)
    holder.close()
    open_spending(annotator, tmp_path).close()


def test_what_an_earlier_run_paid_is_spent_even_if_its_line_is_torn(tmp_path: Path):
    annotator = config("http://x/v1", budget_usd=1.0).annotator
    assert isinstance(annotator, OpenAIAnnotator)
    body = {"choices": [{"message": {"content": ""}}]}
    body |= {"usage": {"prompt_tokens": 100_000, "completion_tokens": 50_000}}
    line = json.dumps({"key": "k", "record": {"latency_s": 1.0, "body": body}}) + "\n"
    (tmp_path / "1-a.jsonl").write_text(line + line)  # paid twice is spent twice
    (tmp_path / "2-b.jsonl").write_text(line[:-9])
    spending = open_spending(annotator, tmp_path)
    assert spending.budget is not None
    assert spending.budget.spent_usd == pytest.approx(2 * (0.1 + 0.1))
    spending.close()


def test_running_figures_have_tokens_cost_and_an_estimate_of_the_total():
    shown: list[dict[str, object]] = []
    spending = Spending(
        Price(prompt=1.0, completion=2.0), Budget(5.0), rows=40, tell=lambda **f: shown.append(f)
    )
    for number in range(10):
        spending.row({f"q{number}": Answer("", prompt_tokens=2000, completion_tokens=500)})
    assert shown[0] == {
        "rows": "1/40",
        "tokens": "2.0k+500",
        "cost": "$0.003000",
        "budget": "$5.0000",
    }
    assert shown[-1]["of about"] == "$0.1200"
    spending.row({"q0": Answer("", prompt_tokens=2000, completion_tokens=500)})  # shared: free
    assert (shown[-1]["rows"], shown[-1]["tokens"]) == ("11/40", "20.0k+5.0k")
    spending.row({"q10": Answer("")})  # an answer without usage
    assert (shown[-1]["cost"], shown[-1]["tokens"]) == ("unknown", "unknown+unknown")
    assert "of about" not in shown[-1]


@pytest.fixture(autouse=True)
def _engine_closed():
    yield
    close_engine()
