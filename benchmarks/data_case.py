"""A store of synthetic rollouts of any size, measured by data.py and data_measure.py.

A response is 500 of SmolLM2's tokens: words by Zipf's law, digits and characters of several bytes,
in sentences and lines, and the end token. The text is what the tokens decode to. 4,096 distinct
responses are cut by the pipeline's segmenter and marked with 1 to 3 spans. Every part holds all of
them, in its own order, with its own ids and log-probabilities, in groups of 8. One rollout in 100
has no reward. The store itself writes the tables.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trace_opd.data.store import Dataset, Draft, Store
from trace_opd.pipelines.annotators.rows import Identity, Item, Reading, annotation_row
from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.labels import AnnotationStatus, DiagnosticType
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.policy import load_tokenizer, vocab_fingerprint
from trace_opd.trace.routed import lists_of
from trace_opd.trace.segment import segment

POLICY = "smollm2"
TOKENS, GROUP, ROWS_PER_PART = 500, 8, 4096
UNSCORED = 0.01
IDS = ("rollout_id", "problem_id", "group_id")
_WORD, _DIGIT, _SIGN = map(re.compile, (r" [A-Za-z]{2,}", r"[0-9]", r" [^\x00-\x7f\ufffd]"))


@dataclass(frozen=True)
class Pool:
    """The distinct responses, one row each; ids are filled in later."""

    rollouts: pa.Table
    verdicts: pa.Table
    annotations: pa.Table


def make_store(root: str, rows: int, pool: Pool) -> Dataset:
    """Problems, rollouts, verdicts and annotations of `rows` rollouts; returns the annotations."""
    rng = np.random.default_rng(rows)
    store = Store(root)
    drafts: dict[str, Draft] = {}
    for stage, contract in (
        ("problems", PROBLEMS), ("rollout", ROLLOUTS), ("verify", VERDICTS),
        ("annotate", ANNOTATIONS),
    ):  # fmt: skip
        # Each stage has the stages before it as inputs, by their tables' names.
        inputs = {draft.contract.name: draft for draft in drafts.values()}
        draft = store.begin(stage, {"rows": rows}, inputs, contract)
        if isinstance(draft, Dataset):
            raise SystemExit(f"{root}: holds this case already; name an empty folder")
        drafts[stage] = draft
    parts = -(-rows // ROWS_PER_PART)
    for part in range(parts):
        count = min(ROWS_PER_PART, rows - part * ROWS_PER_PART)
        for draft, table in zip(drafts.values(), make_part(pool, count, rng), strict=True):
            draft.write_part(part, table)
    return [draft.finish(parts) for draft in drafts.values()][-1]


@cache
def make_pool() -> Pool:
    """The same pool on every call."""
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(resolve_policy(POLICY))
    pieces = byte_table(tokenizer)
    who = Identity("made", "made")
    same = dict.fromkeys((*IDS, "policy_name", "policy_revision"), "") | {
        "sample_index": 0, "prompt_token_ids": list(range(60)), "finish_reason": "stop",
        "policy_step": 0, "vocab_fingerprint": vocab_fingerprint(tokenizer), "temperature": 1.0,
        "top_p": 1.0, "top_k": 0, "max_new_tokens": 1024, "seed": 0, "on_policy": True,
    }  # fmt: skip
    vocabulary = _vocabulary(pieces)
    rollouts, verdicts, annotations = [], [], []
    for _ in range(ROWS_PER_PART):
        token_ids = [*_sentences(vocabulary, pieces, rng), tokenizer.eos_token_id]
        response, correct = pieces.text(token_ids), bool(rng.random() < 0.5)
        item = Item("", "", "", {}, response, segment(response), correct)
        rollouts.append(
            same | {"token_ids": token_ids, "logprobs": [0.0] * TOKENS, "response": response}
        )
        verdicts.append(
            dict.fromkeys(IDS, "")
            | {"reward": float(correct), "correct": correct, "parsed_answer": "7"}
            | {"status": "ok", "verifier": "made", "seconds": 0.001}
        )
        annotations.append(annotation_row(item, who, _reading(item, rng)))
    return Pool(ROLLOUTS.table(rollouts), VERDICTS.table(verdicts), ANNOTATIONS.table(annotations))


def _vocabulary(pieces: ByteTable) -> tuple[np.ndarray, np.ndarray]:
    """Ids to draw and their probabilities: words by Zipf's law, a few digits and characters."""
    kinds = (_WORD, 0.93), (_DIGIT, 0.05), (_SIGN, 0.02)
    texts = [piece.decode(errors="replace") for piece in pieces.pieces]
    found = [[at for at, text in enumerate(texts) if kind.fullmatch(text)] for kind, _ in kinds]
    weights = [1 / np.arange(3, 3 + len(ids)) for ids in found]  # merges are ordered by frequency
    shares = [w / w.sum() * share for w, (_, share) in zip(weights, kinds, strict=True)]
    return np.concatenate(found), np.concatenate(shares)


def _sentences(
    vocabulary: tuple[np.ndarray, np.ndarray], pieces: ByteTable, rng: np.random.Generator
) -> list[int]:
    """A response's tokens without the last: sentences of 8 to 30 tokens, lines of about four."""
    token_ids = rng.choice(vocabulary[0], TOKENS - 1, p=vocabulary[1])
    ends = np.cumsum(rng.integers(8, 31, TOKENS))
    ends = ends[ends < TOKENS - 2]
    token_ids[ends] = pieces.pieces.index(b".")
    token_ids[ends[3::4] + 1] = pieces.pieces.index(b"\n")
    return token_ids.tolist()


def _reading(item: Item, rng: np.random.Generator) -> Reading:
    """1 to 3 spans of 1 or 2 segments."""
    starts = rng.choice(len(item.segments) - 1, rng.integers(1, 4), replace=False).tolist()
    marked = [list(range(start, start + int(rng.integers(1, 3)))) for start in starts]
    label = list(DiagnosticType)[rng.integers(0, len(DiagnosticType))]
    return Reading(AnnotationStatus.OK, marked, label)


def make_part(pool: Pool, rows: int, rng: np.random.Generator) -> tuple[pa.Table, ...]:
    """Problems, rollouts, verdicts and annotations of one part."""
    order = pa.array(rng.permutation(ROWS_PER_PART)[:rows])
    groups = -(-rows // GROUP)
    member = np.arange(rows) // GROUP
    problem_ids, group_ids = (_ids(groups, rng) for _ in range(2))
    ids = {
        "rollout_id": _ids(rows, rng),
        "problem_id": problem_ids.take(pa.array(member)),
        "group_id": group_ids.take(pa.array(member)),
    }
    text = "A shop packs pens into boxes and sells some of them before noon. How many are left?"
    problems = PROBLEMS.table(
        {
            "problem_id": index, "problem": f"{text} ({index})", "answer": "7",
            "answer_kind": "math", "solution": None, "source": "made", "split": "train",
        }
        for index in problem_ids.to_pylist()
    )  # fmt: skip
    logprobs = -rng.standard_exponential(rows * TOKENS, dtype=np.float32) / 3
    offsets = np.arange(rows + 1) * TOKENS
    rollouts = _with(
        pool.rollouts.take(order),
        **ids,
        sample_index=pa.array((np.arange(rows) % GROUP).astype(np.int32)),
        logprobs=lists_of(logprobs, offsets),
    )
    verdicts = _with(pool.verdicts.take(order), **ids)
    silent = pa.array(rng.random(rows) < UNSCORED)
    for name in ("reward", "correct"):
        verdicts = _with(verdicts, **{name: pc.if_else(silent, None, verdicts[name])})
    return problems, rollouts, verdicts, _with(pool.annotations.take(order), **ids)


def _ids(count: int, rng: np.random.Generator) -> pa.Array:
    """`count` random ids of 16 hexadecimal digits."""
    digits = rng.bytes(8 * count).hex().encode()
    offsets = np.arange(count + 1, dtype=np.int32) * 16
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(digits))


def _with(table: pa.Table, **columns: Any) -> pa.Table:
    for name, column in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), column)
    return table
