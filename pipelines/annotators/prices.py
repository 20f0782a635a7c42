"""What an endpoint's tokens cost: a dated data file, a file of the user's, or two numbers in a config.

A price that nobody gives is unknown, which is never the same as zero.
"""

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...schemas.configs import OpenAIAnnotator
from ...schemas.errors import InputError
from ...schemas.text_files import read_text_file
from ...schemas.yaml_text import load_yaml
from .dialogue import Answer

SHIPPED_PRICES = Path(__file__).with_name("prices.yaml")

# Besides its text a message costs the tokens of its frame in the chat template: 3 or 4 in OpenAI's,
# fewer than this in all templates that we know.
_FRAME_TOKENS = 16


class Price(BaseModel):
    """US dollars per million tokens. batch: factor for answers of a batch interface."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)
    cached: float | None = Field(default=None, ge=0)
    batch: float = Field(default=1.0, gt=0, le=1)

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

    def of_tokens(self, prompt_tokens: float, completion_tokens: float) -> float:
        """US dollars of so many tokens, none of them cached."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def worst_case_usd(self, body: dict[str, Any], batched: bool = False) -> float:
        """The most that a request with this body can cost."""
        return self.of_tokens(*most_tokens(body)) * (self.batch if batched else 1.0)

    def billed_usd(self, answer: Answer) -> float | None:
        """What an answer cost, its worst case if its tokens are unknown; None without bounds."""
        usd = self.cost_usd([answer])
        if usd is None and answer.at_most is not None:
            return self.of_tokens(*answer.at_most) * (self.batch if answer.batched else 1.0)
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


def find_price(config: OpenAIAnnotator) -> Price | None:
    """The price of a config's model at its endpoint, None if unknown.

    Numbers in the config win over the user's file, that over the shipped one.

    Raises:
        InputError: one number without the other, or a file of prices that says something else.
    """
    prompt = config.usd_per_million_prompt_tokens
    completion = config.usd_per_million_completion_tokens
    listed = _listed(config)
    if (prompt is None) != (completion is None):
        missing = "prompt" if prompt is None else "completion"
        raise InputError(
            f"annotator.usd_per_million_{missing}_tokens is not set and the other price is; give "
            "both (0 for a server without a bill) or none"
        )
    if prompt is not None and completion is not None:
        # A provider's discount for batches is not a matter of the price that is given.
        batch = listed.batch if listed is not None else 1.0
        return Price(prompt=prompt, completion=completion, batch=batch)
    return listed


def require_price(config: OpenAIAnnotator) -> Price | None:
    """The price, which a budget can't do without.

    Raises:
        InputError: a budget without a known price; as `find_price`.
    """
    price = find_price(config)
    if price is None and config.budget_usd is not None:
        raise InputError(
            f"annotator.budget_usd is {config.budget_usd:g} and the price of model {config.model} "
            f"at {config.base_url} is unknown; set annotator.usd_per_million_prompt_tokens and "
            "annotator.usd_per_million_completion_tokens, or annotator.prices"
        )
    return price


def load_prices(path: str | Path) -> dict[str, _Host]:
    """A file of prices by host.

    Raises:
        InputError: the file is not there, or says something else than it must.
    """
    text = read_text_file(path, "give a file of prices in annotator.prices, or leave it out")
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


def _listed(config: OpenAIAnnotator) -> Price | None:
    where = urlsplit(config.base_url)
    files = [config.prices] if config.prices is not None else []
    for path in (*files, SHIPPED_PRICES):
        hosts = load_prices(path)
        for host in (where.netloc, where.hostname or ""):  # with and without a port
            if host in hosts and config.model in hosts[host].models:
                return hosts[host].models[config.model]
    return None
