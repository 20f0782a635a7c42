"""What an endpoint's tokens cost. Called by the openai engines, their budget and the cost estimate.

The first source that lists the model at its host gives the price: two numbers in the config, the
user's file (setting `prices`), the dated prices.yaml, the catalogue of the package genai-prices.
A price that no source gives is unknown, which is never the same as zero. No source is updated over
the network at run time.
"""

import datetime
import json
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...schemas.configs import PaidEndpoint
from ...schemas.errors import InputError
from ...schemas.text_files import read_text_file
from ...schemas.yaml_text import load_yaml
from .questions import Answer

SHIPPED_PRICES = Path(__file__).with_name("prices.yaml")

# The pinned catalogue and the day of its release: it dates no single price.
CATALOGUE = ("0.2.3", "2026-11-10")
# Prices that a text completion without tools can't incur.
_NOT_FOR_TEXT = re.compile("audio|image|video|searches")
# Most of the catalogue's patterns stop within a URL: api.openai.com.example is another host.
_HOST_END = r"(?:(?<=[/.])|(?=[/:]|$))"
# The provider bills writes to its cache only for requests that ask for caching; ours do not.
_CACHE_ON_REQUEST = {"anthropic"}

# Besides its text a message costs the tokens of its frame in the chat template: 3 or 4 in OpenAI's,
# fewer than this in all templates that we know.
_FRAME_TOKENS = 16


class Price(BaseModel):
    """US dollars per million tokens. batch: factor for answers of a batch interface.

    source: where the price is from, and of which day. A model without one has its host's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)
    cached: float | None = Field(default=None, ge=0)
    batch: float = Field(default=1.0, gt=0, le=1)
    source: str = Field(default="", exclude=True)

    def __str__(self) -> str:
        batch = f", batch x {self.batch:g}" if self.batch != 1 else ""
        return (
            f"${self.prompt:g} per million prompt tokens, ${self.completion:g} per million "
            f"completion tokens{batch} ({self.source})"
        )

    def cost_usd(self, answers: Iterable[Answer]) -> float | None:
        """What answers cost; None if an answer's tokens are unknown."""
        total = 0.0
        for answer in answers:
            if answer.prompt_tokens is None or answer.completion_tokens is None:
                return None
            cached = min(answer.cached_tokens, answer.prompt_tokens)
            usd = self.of_tokens(answer.prompt_tokens - cached, answer.completion_tokens)
            usd += cached * (self.prompt if self.cached is None else self.cached) / 1e6
            total += usd * (self.batch if answer.batched else 1.0)
        return total

    def of_tokens(
        self, prompt_tokens: float, completion_tokens: float, batched: bool = False
    ) -> float:
        """US dollars of so many tokens, none of them cached."""
        usd = (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6
        return usd * (self.batch if batched else 1.0)

    def worst_case_usd(self, body: dict[str, Any], batched: bool = False) -> float:
        """The most that a request with this body can cost."""
        return self.of_tokens(*most_tokens(body), batched)

    def billed_usd(self, answer: Answer) -> float | None:
        """What an answer cost, its worst case if its tokens are unknown; None without bounds."""
        usd = self.cost_usd([answer])
        if usd is None and answer.at_most is not None:
            return self.of_tokens(*answer.at_most, answer.batched)
        return usd


def most_tokens(body: dict[str, Any]) -> tuple[int, int]:
    """Upper bounds of a request's prompt and completion tokens."""
    limit = body.get("max_completion_tokens", body.get("max_tokens", 0))
    return most_prompt_tokens(body), limit


def most_prompt_tokens(body: dict[str, Any]) -> int:
    """An upper bound of a request's prompt tokens, whatever the tokenizer.

    A token holds at least one byte of UTF-8. A schema may be written into the prompt, so it counts.
    """
    texts = [message["content"] for message in body["messages"]]
    if "response_format" in body:
        texts.append(json.dumps(body["response_format"]))
    return sum(len(text.encode()) + _FRAME_TOKENS for text in texts)


class _Host(BaseModel):
    """One provider's prices, read at a date from a source."""

    model_config = ConfigDict(extra="forbid")

    as_of: datetime.date
    source: str
    models: dict[str, Price]


_FILE = TypeAdapter(dict[str, _Host])


def find_price(config: PaidEndpoint) -> Price | None:
    """The price of a config's model at its endpoint, None if unknown.

    Raises:
        InputError: one number without the other, a bad file of prices, a budget without a price.
    """
    prompt = config.usd_per_million_prompt_tokens
    completion = config.usd_per_million_completion_tokens
    if (prompt is None) != (completion is None):
        missing = "prompt" if prompt is None else "completion"
        raise InputError(
            f"{config.role}.usd_per_million_{missing}_tokens is not set and the other price is; "
            "give both (0 for a server without a bill) or none"
        )
    price = _listed(config) or _catalogued(config)
    if prompt is not None and completion is not None:
        # The numbers don't say the provider's discount for batches: it stays the listed one.
        batch = 1.0 if price is None else price.batch
        return Price(prompt=prompt, completion=completion, batch=batch, source="the config")
    if price is None and config.budget_usd is not None:
        raise InputError(
            f"{config.role}.budget_usd is {config.budget_usd:g} and the price of model "
            f"{config.model} at {config.base_url} is unknown; set "
            f"{config.role}.usd_per_million_prompt_tokens and usd_per_million_completion_tokens, "
            "or prices"
        )
    return price


def load_prices(path: str | Path) -> dict[str, _Host]:
    """A file of prices by host.

    Raises:
        InputError: the file is missing or has another content.
    """
    text = read_text_file(path, "give a file of prices in setting prices, or leave it out")
    try:
        return _FILE.validate_python(load_yaml(text))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {where or 'the file'}: {first['msg']}; each host needs as_of, source and "
            "models with prompt and completion, as in the shipped prices.yaml"
        ) from None


def _listed(config: PaidEndpoint) -> Price | None:
    """The price in the user's file, else in the shipped one."""
    where = urlsplit(config.base_url)
    for path in filter(None, (config.prices, SHIPPED_PRICES)):
        hosts = load_prices(path)
        for name in (where.netloc, where.hostname or ""):  # with and without a port
            if name in hosts and (price := hosts[name].models.get(config.model)) is not None:
                source = price.source or hosts[name].source
                source = f"{Path(path).name}, as of {hosts[name].as_of}: {source.strip()}"
                return price.model_copy(update={"source": source})
    return None


def _catalogued(config: PaidEndpoint) -> Price | None:
    """The price in the catalogue that is installed, for a model that it lists by this very name.

    None too for prices that depend on the time of day or on the prompt's length, or that include
    more than tokens: a cost computed from two numbers would be too low.
    """
    from genai_prices import types  # 0.4 s: not before the dated file has no answer
    from genai_prices.data import providers

    name = config.model.lower()
    now = datetime.datetime.now(datetime.UTC)
    for provider in providers:
        if not re.match(f"(?:{provider.api_pattern}){_HOST_END}", config.base_url):
            continue
        for model in provider.models:
            clauses = getattr(model.match, "or_", [model.match])
            names = {c.equals for c in clauses if isinstance(c, types.ClauseEquals)} | {model.id}
            if name not in names:
                continue
            dated = model.prices if isinstance(model.prices, list) else []
            if any(isinstance(one.constraint, types.TimeOfDateConstraint) for one in dated):
                return None
            return _flat_price(
                vars(model.get_prices(now)),
                vars(model.get_prices(now, {"processing": "batch"})),
                provider.id in _CACHE_ON_REQUEST,
            )
    return None


def _flat_price(
    listed: dict[str, Any], batched: dict[str, Any], cache_on_request: bool
) -> Price | None:
    """A catalogue's entry as a price; None if text is billed by more than its tokens."""
    per_token = {name: usd for name, usd in listed.items() if usd is not None}
    for name in list(per_token):
        if _NOT_FOR_TEXT.search(name) or (cache_on_request and name.startswith("cache_write")):
            del per_token[name]
    prompt, completion = (per_token.pop(f"{name}_mtok", None) for name in ("input", "output"))
    cached = per_token.pop("cache_read_mtok", None)
    try:
        prompt, completion = float(prompt), float(completion)  # type: ignore[arg-type]
        cached = None if cached is None else float(cached)
    except TypeError:  # not listed, or in tiers by the prompt's length
        return None
    if per_token:
        return None
    pairs = (
        (float(batched[f"{n}_mtok"]), usd) for n, usd in (("input", prompt), ("output", completion))
    )
    factor = max((part / usd for part, usd in pairs if usd), default=1.0)
    installed, (pinned, released) = version("genai-prices"), CATALOGUE
    date = f", released {released}" if installed == pinned else ""
    source = f"the catalogue of genai-prices {installed}{date}"
    return Price(
        prompt=prompt, completion=completion, cached=cached, batch=min(factor, 1.0), source=source
    )
