"""Stage score: a teacher's likeliest tokens at the routed tokens; the registry loads its `STAGE`.

    trace-opd score config.yaml routed=<dataset> teacher.policy.path=<model>

Training then takes the table in a teacher's place (train.teacher.scores), and stage convert hands
its entropies to the rules that see them (convert.scores).
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Draft, Store, content_hash
from ...schemas.configs import ScoreConfig
from ...schemas.tables import ROUTED, SCORES
from ...trace.policy import load_tokenizer, vocab_fingerprint, vocab_size
from ...trace.sequences import training_sequences
from ..models import resolve_policy
from ..samplers.vocabulary import check_token_ids, check_vocabulary
from ..scoring import Vocabulary, scoring_engine
from ..scoring.rows import scores_table
from .base import PartMaker, Plan, Stage


def _resolve(config: ScoreConfig, store: Store) -> Plan:
    routed = store.get(config.routed, ROUTED)
    vocabulary = _vocabulary(config)
    makers = routed.read_part(0, ["policy_name", "vocab_fingerprint"])
    check_vocabulary(makers, vocabulary.fingerprint, config.policy.path)
    engine = scoring_engine(config)
    semantic = config.semantic()
    del semantic["routed"]  # the dataset's id stands for it
    # Of the policy the tokenizer alone matters: it writes the teacher's prompts.
    template = str(vocabulary.tokenizer.chat_template)
    semantic["policy"] = content_hash([vocabulary.fingerprint, vocabulary.size, template])
    semantic |= engine.identity(vocabulary, routed)
    return Plan(config, {"routed": routed}, semantic, routed.parts, {}, routed.part_rows)


def _vocabulary(config: ScoreConfig) -> Vocabulary:
    path, trusted = resolve_policy(config.policy.path, weights=False), config.policy
    tokenizer = load_tokenizer(path, trusted.trust_remote_code)
    size = vocab_size(path, trusted.trust_remote_code)
    return Vocabulary(tokenizer, vocab_fingerprint(tokenizer), size)


@contextmanager
def _open(plan: Plan, draft: Draft) -> Iterator[PartMaker]:
    config: ScoreConfig = plan.config
    vocabulary, routed = _vocabulary(config), plan.inputs["routed"]
    with closing(scoring_engine(config).open(vocabulary)) as scorer:

        def make(part: int) -> pa.Table:
            table = routed.read_part(part)
            check_token_ids(table, vocabulary.size, f"{routed.ref}, part {part}")
            sequences = training_sequences(table, vocabulary.tokenizer, config.prompt)
            scored = scorer.score([one for one in sequences if one.routed_end])
            return scores_table(sequences, scored, config.temperature, scorer)

        yield make


@dataclass(frozen=True)
class _Digest:
    """A part: rows, scored tokens, likeliest tokens kept, and sums over the tokens."""

    rows: int
    tokens: int
    kept: int
    tail: float
    surprise: float


def _digest(table: pa.Table) -> _Digest:
    tail = pc.list_flatten(table["tail_logprobs"]).to_numpy().astype(np.float64)
    surprise = pc.list_flatten(table["logprobs"]).to_numpy().astype(np.float64)
    kept = pc.sum(pc.list_value_length(table["top_token_ids"])).as_py() or 0
    return _Digest(len(table), len(tail), kept, float(np.exp(tail).sum()), float(-surprise.sum()))


def _summarize(plan: Plan, digests: Iterator[_Digest]) -> dict[str, Any]:
    parts = list(digests)
    tokens = sum(part.tokens for part in parts)

    def mean(total: float) -> float | None:
        return round(total / tokens, 6) if tokens else None

    return {
        "sequences": sum(part.rows for part in parts),
        "scored_tokens": tokens,
        "k": sum(part.kept for part in parts) // tokens if tokens else None,
        "mean_tail_mass": mean(sum(part.tail for part in parts)),
        "mean_surprise": mean(sum(part.surprise for part in parts)),
    }


STAGE = Stage(
    "score",
    ScoreConfig,
    SCORES,
    _resolve,
    _open,
    _summarize,
    ("tail_logprobs", "logprobs", "top_token_ids"),
    _digest,
)
