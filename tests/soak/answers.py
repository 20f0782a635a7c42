"""Answers, failures and bills of the soak's endpoint, as pure functions. Used by endpoint.py.

An answer's content is a function of the seed and the question. Whether and how an attempt fails is
a function of the round, the question and the number of earlier attempts.
"""

import json
import random
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

USD_PER_MILLION = (3.0, 15.0)  # prompt and completion tokens
MAX_NEW_TOKENS = 64
TIMEOUT_S = 2.0  # annotator.timeout_s
PATIENCE_S = 20.0  # annotator.patience_s
ID = re.compile(rb'"id": ?"soak-([0-9a-f]{16})-')

# The weight of each failure in the draw, and whether its answer was generated and so is billed.
FAILURES: dict[str, tuple[int, bool]] = {
    "busy": (4, False),  # 429 with Retry-After in seconds
    "busy until": (1, False),  # 429 with an HTTP date
    "absurd wait": (1, False),  # 429 with a Retry-After beyond the client's patience
    "error": (3, False),  # 500
    "down": (3, False),  # 503
    "gateway": (1, True),  # 504
    "reset": (3, True),  # connection reset in the middle of the body
    "half": (3, True),  # half of the body, then end of stream
    "stall": (1, True),  # half of the body, then nothing
    "html": (2, False),
    "empty": (1, False),
    "no message": (1, True),
    "redirect": (1, False),  # 307 to another origin
}
# Clean: the answer arrives and must be journalled.
CLEAN = {"plain": 6, "drip": 2, "two choices": 1}
_SHARE = (0.4, 0.35, 0.3)  # share of failures in the first attempts; later attempts succeed
_CONTENTS = {
    "valid": 12,
    "fenced": 1,
    "abstain": 2,
    "empty": 1,
    "nonsense": 2,
    "cut": 2,
    "refused": 1,
}
_USAGES = ("true", "none", "negative", "float", "text", "huge", "list")


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it. usd: the amount billed. clean: a usable answer was sent."""

    key: str
    attempt: int
    how: str
    usd: float
    clean: bool


def question(body: dict[str, Any]) -> str:
    """Everything that decides an answer."""
    decides = [body["messages"], body.get("max_tokens", body.get("max_completion_tokens"))]
    return sha256(json.dumps(decides).encode()).hexdigest()[:16]


def transport(round_seed: str, key: str, attempt: int, faulty: bool) -> str:
    """The outcome of the `attempt`-th request for a question: a key of FAILURES or CLEAN."""
    chance = random.Random(f"{round_seed} {key} {attempt}")
    if faulty and attempt < len(_SHARE) and chance.random() < _SHARE[attempt]:
        weights = [weight for weight, _ in FAILURES.values()]
        return chance.choices(list(FAILURES), weights)[0]
    return chance.choices(list(CLEAN), list(CLEAN.values()))[0] if faulty else "plain"


def answer(seed: int, body: dict[str, Any], lies: bool) -> tuple[dict[str, Any], float]:
    """The chat completion and its price in US dollars."""
    key = question(body)
    chance = random.Random(f"{seed} {key}")
    limit: int = body.get("max_tokens") or body["max_completion_tokens"]
    kind = "valid"
    if len(body["messages"]) == 2 and limit == MAX_NEW_TOKENS:  # no correction, no raised limit
        kind = chance.choices(list(_CONTENTS), list(_CONTENTS.values()))[0]
    message: dict[str, Any] = {"role": "assistant", "content": _content(kind, body, chance)}
    if kind == "refused":
        message |= {"content": None, "refusal": "I cannot help with that."}
    size = sum(len(message["content"].encode()) for message in body["messages"])
    tokens = size // 3, limit if kind == "cut" else chance.randint(10, limit)
    usd = sum(n * price for n, price in zip(tokens, USD_PER_MILLION, strict=True)) / 1e6
    if lies and message["content"] and chance.random() < 0.2:
        message["content"] = [{"type": "text", "text": message["content"]}]
    usage = _usage(chance.choice(_USAGES) if lies else "true", *tokens)
    finish = "length" if kind == "cut" else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"object": "chat.completion", "choices": [choice]} | usage, usd


def _content(kind: str, body: dict[str, Any], chance: random.Random) -> str:
    last = re.findall(r"numbered 0 to (\d+)", body["messages"][-1]["content"])
    segment = chance.randint(0, int(last[-1])) if last else 0
    marks = kind in ("valid", "fenced", "cut")
    spans = [{"segments": [segment], "quote": None}] if marks else []
    text = json.dumps({"abstain": kind == "abstain", "spans": spans, "type": "arithmetic"})
    if kind == "fenced":
        return f"```json\n{text}\n```"
    if kind == "nonsense":
        return 'The mistake is in segment \\u0000, I would say: {"spans": ['
    return text[: len(text) // 2] if kind == "cut" else text


def _usage(kind: str, prompt: int, completion: int) -> dict[str, Any]:
    if kind == "none":
        return {}
    lies = {"negative": -completion, "float": completion + 0.5, "text": str(completion)}
    reported: Any = lies.get(kind, completion)
    reported = 2**40 if kind == "huge" else [completion] if kind == "list" else reported
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": reported}}
