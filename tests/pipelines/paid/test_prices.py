"""Prices: the user's own, a dated file with sources, a catalogue; unknown for other models."""

import socket
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.pipelines.paid.prices import (
    CATALOGUE,
    SHIPPED_PRICES,
    Price,
    _catalogued,
    find_price,
    load_prices,
    most_prompt_tokens,
)
from trace_opd.pipelines.paid.questions import Answer
from trace_opd.pipelines.paid.spending import Spending, dollars
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


NUMBERS = ("usd_per_million_prompt_tokens", "usd_per_million_completion_tokens")
LISTED = {"base_url": "https://api.groq.com/openai/v1", "model": "llama-3.3-70b-versatile"}


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


def found(**changes) -> Price | None:
    """The price without its source."""
    price = find_price(config(**changes))
    return None if price is None else Price(**price.model_dump())


def test_a_price_is_found_by_host_and_exact_model():
    assert found() == Price(prompt=0.4, completion=1.6, cached=0.1, batch=0.5)
    assert find_price(config(model="gpt-4.1-mini-of-mine")) is None
    assert find_price(config(base_url="https://proxy.example/v1")) is None
    assert find_price(config(base_url="http://127.0.0.1:8000/v1")) is None


def test_numbers_win_over_the_users_file_and_that_over_the_shipped_one(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(MINE)
    assert found(prices=str(mine)) == Price(prompt=7, completion=9)
    assert found(prices=str(mine), model="gpt-4.1") == found(model="gpt-4.1")
    own = {"prices": str(mine), "base_url": "http://127.0.0.1:8000/v1", "model": "mine"}
    assert found(**own) == Price(prompt=0, completion=0)
    numbers = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 0.0}
    assert found(prices=str(mine), **numbers) == Price(prompt=1, completion=0)
    assert found(**numbers) == Price(prompt=1, completion=0, batch=0.5)


def test_each_price_names_its_source_and_the_day_of_it(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(MINE)
    sources = [
        ({}, "prices.yaml, as of 2026-11-25: litellm"),
        ({"prices": str(mine)}, "mine.yaml, as of 2026-01-02: https://example.org/contract"),
        (LISTED, f"the catalogue of genai-prices {CATALOGUE[0]}, released {CATALOGUE[1]}"),
        (dict.fromkeys(NUMBERS, 1.0), "the config"),
    ]
    for changes, source in sources:
        assert f"({source}" in str(find_price(config(**changes)))
    assert "0.4 per million prompt tokens, $1.6" in str(find_price(config()))


# --- the catalogue -------------------------------------------------------------------------------


def test_the_catalogue_serves_models_that_no_file_lists_and_sends_nothing(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    assert found(**LISTED) == Price(prompt=0.59, completion=0.79)
    batched = {"base_url": "https://api.anthropic.com/v1/", "model": "claude-opus-4-8"}
    assert found(**batched) == Price(prompt=5, completion=25, cached=0.5, batch=0.5)


def test_the_catalogue_that_is_installed_is_the_one_whose_release_is_dated():
    assert version("genai-prices") == CATALOGUE[0]
    assert any(f"genai-prices=={CATALOGUE[0]};" in text for text in requires("trace-opd") or [])


@pytest.mark.parametrize(
    ("url", "model"),
    [
        ("https://api.openai.com/v1", "gpt-4.1-nano-of-mine"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-pro"),  # tiers
        ("https://api.deepseek.com", "deepseek-chat"),  # by the time of day
        ("https://api.perplexity.ai", "sonar"),  # a fee per request
        ("https://api.x.ai.example/v1", "grok-3"),
    ],
)
def test_a_price_that_two_numbers_do_not_give_is_unknown(url: str, model: str):
    assert find_price(config(base_url=url, model=model)) is None


def test_the_dated_file_and_the_catalogue_agree_where_both_list_a_model():
    both = 0
    for host, listed in load_prices(SHIPPED_PRICES).items():
        for model, price in listed.models.items():
            other = _catalogued(config(base_url=f"https://{host}/v1", model=model))
            if other is not None:
                both += 1
                names = ("prompt", "completion", "cached")
                assert [getattr(other, n) for n in names] == [getattr(price, n) for n in names]
    assert both >= 20


def test_one_number_without_the_other_is_refused():
    with pytest.raises(InputError, match=r"usd_per_million_completion_tokens is not set"):
        find_price(config(usd_per_million_prompt_tokens=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "the file: Input should be a valid dictionary"),
        ("h: {source: s, models: {}}", "h.as_of: Field required"),
        ("h: {as_of: 2026-01-01, source: s, models: {m: {prompt: 1}}}", "h.models.m.completion"),
        ("h: {as_of: 2026-01-01, source: s, models: {m: {prompt: -1, completion: 1}}}", "m.prompt"),
    ],
)
def test_a_bad_file_of_prices_is_one_sentence(tmp_path: Path, text: str, message: str):
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
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
    one = {"question": Answer("", prompt_tokens=1, completion_tokens=1)}
    assert Spending().charge("row", one).cost_usd is None
    assert Spending(Price(prompt=1, completion=1)).charge("row", {}).cost_usd == 0.0
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
