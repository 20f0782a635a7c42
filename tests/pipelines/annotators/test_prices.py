"""Prices: a dated file with sources, the user's own before it, and unknown where nobody knows."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.pipelines.annotators.dialogue import Answer
from trace_opd.pipelines.annotators.prices import (
    SHIPPED_PRICES,
    Price,
    find_price,
    load_prices,
    most_prompt_tokens,
)
from trace_opd.pipelines.annotators.spending import Spending, dollars
from trace_opd.schemas.configs import OpenAIAnnotator
from trace_opd.schemas.errors import InputError

MINE = """
api.openai.com:
  as_of: 2026-01-02
  source: https://example.org/contract
  models:
    gpt-4.1-mini: { prompt: 7, completion: 9 }
127.0.0.1:8000:
  as_of: 2026-01-02
  source: https://example.org/power
  models:
    mine: { prompt: 0, completion: 0 }
"""


def config(**changes) -> OpenAIAnnotator:
    return OpenAIAnnotator(**{"engine": "openai", "model": "gpt-4.1-mini"} | changes)


def test_each_shipped_price_has_a_date_and_a_source_on_the_web():
    hosts = load_prices(SHIPPED_PRICES)
    assert "api.openai.com" in hosts
    for host, listed in hosts.items():
        assert "https://" in listed.source, host
        assert listed.as_of.year >= 2026, host
        assert all(0 < p.prompt <= p.completion for p in listed.models.values()), host
        assert all(p.cached is None or p.cached < p.prompt for p in listed.models.values()), host


def test_a_price_is_found_by_host_and_exact_model():
    assert find_price(config()) == Price(prompt=0.4, completion=1.6, cached=0.1, batch=0.5)
    assert find_price(config(model="gpt-4.1-mini-of-mine")) is None
    assert find_price(config(base_url="https://proxy.example/v1")) is None
    assert find_price(config(base_url="http://127.0.0.1:8000/v1")) is None


def test_numbers_win_over_the_users_file_and_that_over_the_shipped_one(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(MINE)
    assert find_price(config(prices=str(mine))) == Price(prompt=7, completion=9)
    assert find_price(config(prices=str(mine), model="gpt-4.1")) == find_price(
        config(model="gpt-4.1")
    )
    own = config(prices=str(mine), base_url="http://127.0.0.1:8000/v1", model="mine")
    assert find_price(own) == Price(prompt=0, completion=0)
    numbers = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 0.0}
    assert find_price(config(prices=str(mine), **numbers)) == Price(prompt=1, completion=0)
    assert find_price(config(**numbers)) == Price(prompt=1, completion=0, batch=0.5)


def test_one_number_without_the_other_is_refused():
    with pytest.raises(InputError, match=r"usd_per_million_completion_tokens is not set"):
        find_price(config(usd_per_million_prompt_tokens=1.0))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "the file: Input should be a valid dictionary"),
        ("h: {source: s, models: {}}", "h.as_of: Field required"),
        ("h: {as_of: 2026-01-01, source: s, models: {m: {prompt: 1}}}", "h.models.m.completion"),
        ("h: {as_of: 2026-01-01, source: s, models: {m: {prompt: -1, completion: 1}}}", "m.prompt"),
    ],
)
def test_a_bad_file_of_prices_is_told_in_a_sentence(tmp_path: Path, text: str, told: str):
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        find_price(config(prices=str(path)))
    with pytest.raises(InputError, match="No such file"):
        find_price(config(prices=str(tmp_path / "none.yaml")))


def test_cached_tokens_and_batches_cost_their_own_price():
    price = Price(prompt=2.0, completion=10.0, cached=0.5, batch=0.5)
    answer = Answer("", prompt_tokens=1_000_000, completion_tokens=100_000)
    cached = Answer("", prompt_tokens=1_000_000, completion_tokens=100_000, cached_tokens=400_000)
    batched = Answer("", prompt_tokens=1_000_000, completion_tokens=100_000, batched=True)
    assert price.cost_usd([answer]) == pytest.approx(3.0)
    assert price.cost_usd([cached]) == pytest.approx(0.6 * 2 + 0.4 * 0.5 + 1.0)
    assert price.cost_usd([batched, answer]) == pytest.approx(1.5 + 3.0)
    assert price.cost_usd([]) == 0.0


def test_unknown_is_never_zero():
    silent = Answer("", prompt_tokens=None, completion_tokens=3)
    assert Price(prompt=0, completion=0).cost_usd([silent]) is None
    assert Spending().row([Answer("", prompt_tokens=1, completion_tokens=1)]).cost_usd is None
    assert Spending(Price(prompt=1, completion=1)).row([]).cost_usd == 0.0
    assert (dollars(None), dollars(0.0), dollars(1234.5)) == ("unknown", "$0.00", "$1,234.50")


@given(st.lists(st.text(max_size=50), min_size=1), st.integers(1, 4096))
def test_the_worst_case_counts_a_token_per_byte_and_the_whole_limit(texts, limit: int):
    body = {"messages": [{"role": "user", "content": text} for text in texts]}
    price = Price(prompt=3.0, completion=5.0, batch=0.5)
    size = sum(len(text.encode()) for text in texts)
    for name in ("max_tokens", "max_completion_tokens"):
        worst = price.worst_case_usd(body | {name: limit})
        assert worst >= (size * 3.0 + limit * 5.0) / 1e6
        assert price.worst_case_usd(body | {name: limit}, batched=True) == pytest.approx(worst / 2)
    schema = {"response_format": {"type": "json_object"}}
    assert most_prompt_tokens(body | schema) > most_prompt_tokens(body) >= size
