"""Routed tables of random parts equal those made row by row.

The slow twin works on one dictionary per row and follows METHOD.md.
"""

import math
from functools import cache
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import RoutingConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.labels import DiagnosticType, Route
from trace_opd.schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, ROUTED, VERDICTS
from trace_opd.trace import routed
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.policy import load_tokenizer
from trace_opd.trace.routed import routed_table

# --- the slow twin --------------------------------------------------------------------------------


def row_by_row(
    problems: pa.Table,
    rollouts: pa.Table,
    verdicts: pa.Table,
    annotations: pa.Table | None,
    table: ByteTable,
    config: RoutingConfig,
    with_teacher: bool = True,
) -> list[dict[str, Any]]:
    by_id = {row["problem_id"]: row for row in problems.to_pylist()}
    marked = annotations.to_pylist() if annotations is not None else [None] * len(rollouts)
    rows = [
        rollout | verdict | {"annotation": annotation, "problem": by_id[rollout["problem_id"]]}
        for rollout, verdict, annotation in zip(
            rollouts.to_pylist(), verdicts.to_pylist(), marked, strict=True
        )
        if verdict["reward"] is not None and rollout["on_policy"] and rollout["token_ids"]
    ]
    for row in rows:
        row["truncated"] = row["finish_reason"] == "length"
        if config.overlong == "soft":
            buffer = min(config.overlong_buffer, row["max_new_tokens"])
            over = len(row["token_ids"]) - (row["max_new_tokens"] - buffer)
            row["reward"] -= min(max(over / buffer, 0.0), 1.0)
    for row in rows:
        row["advantage"] = _advantage(row, rows, config)
    if config.overlong == "mask":
        rows = [row for row in rows if not row["truncated"]]
    return [_routed(row, rows, table, config, with_teacher) for row in rows]


def _advantage(row: dict, rows: list[dict], config: RoutingConfig) -> float:
    group = [other["reward"] for other in rows if other["group_id"] == row["group_id"]]
    if len(set(group)) == 1:
        return 0.0
    mean = sum(group) / len(group)
    if config.advantage == "mean":
        return row["reward"] - mean
    std = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (len(group) - 1))
    return (row["reward"] - mean) / (std + config.advantage_eps)


def _routed(
    row: dict, rows: list[dict], table: ByteTable, config: RoutingConfig, with_teacher: bool
) -> dict[str, Any]:
    label = row["annotation"] and row["annotation"]["diagnostic_type"]
    context = label if config.teacher_context == "type" else _context(row, rows, config)
    segment, spans = [-1] * len(row["token_ids"]), []
    if row["annotation"] and row["annotation"]["segments"]:
        bounds = [(one["start"], one["end"]) for one in row["annotation"]["segments"]]
        segment = table.token_segments(row["token_ids"], bounds).tolist()
        spans = [span["segments"] for span in row["annotation"]["spans"]]
    marked = [one in {index for span in spans for index in span} for one in segment]
    span_id = [-1] * len(segment)
    if context and with_teacher:
        span_id = _span_ids(row, segment, spans, marked, config)
    action = config.key if row["correct"] else config.error
    route = [int(action) if rank >= 0 else int(Route.GRPO) for rank in span_id]
    shown = config.teacher_context != "type" and any(route)
    return {name: row[name] for name in ROUTED.schema.names if name in row} | {
        "problem": row["problem"]["problem"],
        "route": route,
        "span_id": span_id,
        "diagnostic_type": label if any(rank >= 0 for rank in span_id) else None,
        "teacher_context": context if shown else None,
        "coverage": sum(rank >= 0 for rank in span_id) / len(span_id),
        "dropped_tokens": sum(m and r < 0 for m, r in zip(marked, span_id, strict=True)),
    }


def _context(row: dict, rows: list[dict], config: RoutingConfig) -> str | None:
    if config.teacher_context != "peer":
        return row["problem"][config.teacher_context]
    peers = (r for r in rows if r["correct"] and r["group_id"] == row["group_id"] and r is not row)
    return next((r["response"] for r in sorted(peers, key=lambda r: r["sample_index"])), None)


def _span_ids(
    row: dict, segment: list[int], spans: list, marked: list[bool], config: RoutingConfig
) -> list[int]:
    rule = config.rule.removeprefix(OWN)
    room = math.floor(config.alpha * len(segment) + 1e-9)
    span_id = [-1] * len(segment)
    if rule in ("random", "inverted"):
        free = [at for at, inside in enumerate(marked) if rule == "random" or not inside]
        draw = np.random.default_rng(list(row["rollout_id"].encode()))
        for at in draw.choice(np.array(free, int), min(room, len(free)), replace=False).tolist():
            span_id[at] = 0
        return span_id
    if rule == "all":
        return [0] * len(segment)
    if rule in ("prefix", "surprise"):
        order = range(len(segment))
        if rule == "surprise":
            order = sorted(order, key=lambda at: row["logprobs"][at])
        for at in list(order)[:room]:
            span_id[at] = 0
        return span_id
    if rule in ("first_span", "from_first_span"):
        first = min((one for one in set(segment) for span in spans if one in span), default=None)
        if first is None:
            return span_id
        begin = segment.index(first)
        rank = next(rank for rank, span in enumerate(spans) if first in span)
        if rule == "from_first_span":
            return [-1] * begin + [rank] * (len(segment) - begin)
        for at in [i for i, own in enumerate(segment) if own == first][:room]:
            span_id[at] = rank
        return span_id
    kept, full = 0, False
    for rank, index in ((rank, index) for rank, span in enumerate(spans) for index in span):
        at = [i for i, own in enumerate(segment) if own == index and span_id[i] < 0]
        full = full or len(at) > room - kept
        if full and kept:
            break
        for i in at[: room - kept]:
            span_id[i] = rank
        kept += len(at[: room - kept])
    return span_id


# --- random parts ---------------------------------------------------------------------------------


def _word_pieces(byte_fallback: bool) -> Tokenizer:
    letters = ["▁", *"abé漢. \n", "▁a", "ab"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=byte_fallback))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "Ġa", "ab", "Ã©", "b.", "æ¼", "¢ð"]  # the last two cut characters apart
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@cache
def table_of(kind: str) -> ByteTable:
    if kind == "characters":
        return byte_table(load_tokenizer(resolve_policy("micro")))
    made = _bytes() if kind == "byte level" else _word_pieces(byte_fallback=True)
    return byte_table(PreTrainedTokenizerFast(tokenizer_object=made))


KINDS = ["byte level", "byte fallback", "characters"]
# Under this name a rule counts as the user's own: it sees one response at a time.
OWN = "trace_opd.trace.rules:"


@st.composite
def token_lists(draw: st.DrawFn, table: ByteTable) -> list[int]:
    """Mostly complete characters, sometimes any ids, even past the end of the table."""
    size = len(table.pieces)
    if draw(st.integers(0, 3)) == 0:
        return draw(st.lists(st.integers(0, size + 2), max_size=12))
    of_byte = {piece: index for index, piece in enumerate(table.pieces) if len(piece) == 1}
    texts = [i for i, piece in enumerate(table.pieces) if _is_text(piece)]
    text = draw(st.lists(st.sampled_from([*texts, "é", "漢", "😀", size - 1]), max_size=24))
    out: list[int] = []
    for one in text:
        pieces = [one] if isinstance(one, int) else [of_byte.get(bytes([b])) for b in one.encode()]
        out += [piece for piece in pieces if piece is not None]
    return out


def _is_text(piece: bytes) -> bool:
    try:
        return bool(piece.decode())
    except UnicodeDecodeError:
        return False


@st.composite
def parts(draw: st.DrawFn, table: ByteTable) -> dict[str, pa.Table]:
    problems = PROBLEMS.table(
        {
            "problem_id": f"p{index}", "problem": f"problem {index}", "answer": f"answer {index}",
            "answer_kind": "math", "solution": draw(st.sampled_from([None, "", "a way"])),
            "source": "test", "split": "train",
        }
        for index in range(3)
    )  # fmt: skip
    made = [draw(rows(table, index)) for index in range(draw(st.sampled_from([0, 2, 4, 6])))]
    tables = zip((ROLLOUTS, VERDICTS, ANNOTATIONS), zip(*made, strict=True), strict=False)
    named = {contract.name: contract.table(group) for contract, group in tables}
    empty = {c.name: c.empty() for c in (ROLLOUTS, VERDICTS, ANNOTATIONS)}
    return {"problems": problems} | empty | named


@st.composite
def rows(draw: st.DrawFn, table: ByteTable, index: int) -> tuple[dict, dict, dict]:
    group = draw(st.integers(0, 2))
    ids = {"rollout_id": f"r{index}", "problem_id": f"p{group}", "group_id": f"g{group}"}
    token_ids = draw(token_lists(table))
    response = table.text(token_ids)
    rollout = ids | {
        "sample_index": draw(st.integers(0, 3)),
        "prompt_token_ids": draw(st.sampled_from([[3], [1, 2]])),
        "token_ids": token_ids, "logprobs": [-0.1 * at for at in range(len(token_ids))],
        "response": response, "finish_reason": draw(st.sampled_from(["stop", "length"])),
        "policy_name": "p", "policy_revision": "r", "policy_step": 0, "vocab_fingerprint": "v",
        "temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_new_tokens": draw(st.integers(1, 30)),
        "seed": index, "on_policy": draw(st.integers(0, 9)) > 0,
    }  # fmt: skip
    reward = draw(st.sampled_from([None, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.1]))
    verdict = ids | {
        "reward": reward, "correct": None if reward is None else reward == 1, "status": "ok",
        "verifier": "v", "seconds": 0.0,
    }  # fmt: skip
    cuts = draw(st.lists(st.integers(0, len(response)), max_size=5)) if response else []
    edges = sorted({0, len(response), *cuts}) if response else []
    if draw(st.integers(0, 9)) == 0:
        edges = []
    segments = [{"start": a, "end": b} for a, b in pairwise(edges)]
    inside = st.lists(st.integers(0, max(len(segments) - 1, 0)), min_size=1, max_size=3)
    spans = [
        {"segments": one, "kind": "key", "rank": rank, "start": 0, "end": 0, "text": ""}
        for rank, one in enumerate(draw(st.lists(inside, max_size=4)))
    ]
    annotation = ids | {
        "correct": verdict["correct"], "segments": segments, "spans": spans, "status": "ok",
        "diagnostic_type": draw(st.sampled_from([None, *[*DiagnosticType][:2] * 3])),
        "annotator_name": "a", "annotator_model": "m", "prompt_version": "", "latency_s": 0.0,
    }  # fmt: skip
    return rollout, verdict, annotation


RULES_DRAWN = [
    "spans", "spans", "all", "random", "inverted", "first_span", "from_first_span", "prefix",
    "surprise", f"{OWN}spans", f"{OWN}from_first_span", f"{OWN}surprise",
]  # fmt: skip
configs = st.builds(
    RoutingConfig,
    rule=st.sampled_from(RULES_DRAWN),
    alpha=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0]),
    key=st.sampled_from(list(Route)),
    error=st.sampled_from(list(Route)),
    teacher_context=st.sampled_from(["type", "type", "answer", "solution", "peer"]),
    advantage=st.sampled_from(["std", "mean"]),
    overlong=st.sampled_from(["keep", "mask", "soft"]),
    overlong_buffer=st.sampled_from([1, 8, 256]),
)


@pytest.mark.parametrize("kind", KINDS)
@given(
    data=st.data(),
    config=configs,
    with_annotations=st.sampled_from([True] * 7 + [False]),
    with_teacher=st.sampled_from([True] * 7 + [False]),
    block_tokens=st.sampled_from([1, 20, 1 << 18]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_part_is_routed_as_row_by_row(
    kind, data, config, with_annotations, with_teacher, block_tokens
):
    table = table_of(kind)
    *tables, annotations = data.draw(parts(table)).values()
    tables.append(annotations if with_annotations else None)
    expected = ROUTED.table(row_by_row(*tables, table, config, with_teacher))
    with patch.object(routed, "_BLOCK_TOKENS", block_tokens):
        made = routed_table(*tables, table, config, with_teacher)
    assert validate(made, ROUTED).equals(expected)


@given(data=st.data(), config=configs)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_tables_of_several_chunks_and_slices_of_others_give_the_same(data, config):
    table = table_of("byte level")
    tables = [*data.draw(parts(table)).values()]
    chunked = [
        pa.concat_tables([one.slice(0, 2), pa.concat_tables([one, one]).slice(2, len(one) - 2)])
        if len(one) > 2
        else one
        for one in tables
    ]
    assert routed_table(*chunked, table, config).equals(routed_table(*tables, table, config))
