"""Arrow contracts of the tables that stages exchange: problems to routed.

Each stage writes one; `contract.validate` checks a table against it. See results.py for results.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .contract import described, list_of, make_contract
from .labels import (
    TYPE_LABELS,
    AnnotationStatus,
    AnswerKind,
    ErrorType,
    FinishReason,
    LeftOut,
    Route,
    Selection,
    SpanKind,
    VerdictStatus,
)
from .results import EVALUATIONS
from .reward_columns import no_json_objects, odd_parts
from .spans import misplaced_spans, torn_segments

# A log-probability computed as a difference of floats may round to slightly above 0.
MOST_LOGPROB = 1e-3
MOST_TOKEN_ID = 2**31 - 1

_string, _int32, _float32, _bool = pa.string(), pa.int32(), pa.float32(), pa.bool_()
_PROBLEM_ID = described("problem_id", _string, "Hash of source, problem text and answer.")
_ROLLOUT_ID = described(
    "rollout_id", _string, "Hash of problem, policy, sampling parameters and sample index."
)
_GROUP_ID = described("group_id", _string, "Rollouts of one problem by one policy share it.")
_CORRECT = described(
    "correct", _bool, "Whether the final answer equals the gold answer; null if unscored.", True
)
_TYPE = described(
    "diagnostic_type",
    _string,
    "One label of DiagnosticType, or of ErrorType for a wrong response; null without spans.",
    True,
)
_POLICY = [
    described("policy_name", _string, "Name of the policy that sampled the response."),
    described(
        "policy_revision",
        _string,
        "Hash of its model files; in training, of the base that the run started from.",
    ),
    described("policy_step", _int32, "Optimiser steps that the weights had seen in this run."),
    described("vocab_fingerprint", _string, "Hash of the vocabulary; empty if no ids are known."),
]
_TOKENS = [
    described(
        "prompt_token_ids", list_of(_int32), "The prompt's token ids as the sampler saw them."
    ),
    described("token_ids", list_of(_int32), "The sampler's own response ids, never re-encoded."),
    described(
        "logprobs",
        list_of(_float32),
        "Natural-log probability of each response token under the sampling policy at the sampling "
        "temperature, before top-p and top-k.",
    ),
]

_ROUTES = ", ".join(f"{route.label} {int(route)}" for route in Route)
_MOST = float(np.finfo(np.float32).max)
_TOKEN_RANGES = {
    "prompt_token_ids": (0, MOST_TOKEN_ID),
    "token_ids": (0, MOST_TOKEN_ID),
    "logprobs": (-_MOST, MOST_LOGPROB),
    "temperature": (0, _MOST),
}


def _untaught(table: pa.Table) -> Any:
    """Rows with a routed token but no context for their teacher."""
    bare = pc.and_(pc.is_null(table["diagnostic_type"]), pc.is_null(table["teacher_context"]))
    rows = np.flatnonzero(bare.to_numpy())
    routes = table["route"].combine_chunks().take(pa.array(rows, pa.int64()))
    mask = np.zeros(len(table), dtype=bool)
    routed = np.flatnonzero(pc.list_flatten(routes).to_numpy())
    mask[rows[pc.list_parent_indices(routes).to_numpy()[routed]]] = True
    return pa.array(mask)


def _uneven_scores(table: pa.Table) -> Any:
    """Rows whose likeliest tokens are not equally many at each position."""
    places, top = (
        pc.list_value_length(table[name]).to_numpy() for name in ("positions", "top_token_ids")
    )
    share = top // np.maximum(places, 1)
    return pa.array((share * places != top) | ((places > 0) & (top == 0)))


def _unordered_positions(table: pa.Table) -> Any:
    """Rows whose positions do not ascend."""
    lists = table["positions"].combine_chunks()
    values, rows = pc.list_flatten(lists).to_numpy(), pc.list_parent_indices(lists).to_numpy()
    mask = np.zeros(len(table), dtype=bool)
    mask[rows[1:][(np.diff(values) <= 0) & (np.diff(rows) == 0)]] = True
    return pa.array(mask)


def _misfit(name: str) -> Callable[[pa.Table], Any]:
    """Rows in which an optional list has another length than the positions."""

    def rows(table: pa.Table) -> Any:
        if name not in table.column_names:
            return pa.array(np.zeros(len(table), dtype=bool))
        lengths = (pc.list_value_length(table[column]) for column in ("positions", name))
        return pc.fill_null(pc.not_equal(*lengths), pa.scalar(False))

    return rows


def _uncompared(table: pa.Table) -> Any:
    """Rows with a reweighted token but no contrast, in a table that has contrasts."""
    mask = np.zeros(len(table), dtype=bool)
    if "contrast_contexts" in table.column_names:
        counts = pc.list_value_length(table["contrast_contexts"]).to_numpy()
        rows = np.flatnonzero(~(counts > 0))  # null is NaN
        routes = table["route"].combine_chunks().take(pa.array(rows, pa.int64()))
        compared = pc.list_flatten(routes).to_numpy() == int(Route.REWEIGHT)
        mask[rows[pc.list_parent_indices(routes).to_numpy()[compared]]] = True
    return pa.array(mask)


_NO_MISTAKE = (
    "diagnostic_type",
    "names a mistake, and the response is right or has key spans; give it a label of "
    "DiagnosticType",
)


def _mistakes(table: pa.Table) -> Any:
    """Rows whose label names a mistake."""
    return pc.is_in(table["diagnostic_type"], value_set=pa.array([str(x) for x in ErrorType]))


def _mistake_in_right(table: pa.Table) -> Any:
    """Rows of right responses whose label names a mistake."""
    return pc.and_(_mistakes(table), pc.is_in(table["correct"], value_set=pa.array([True])))


def _mistake_in_key(table: pa.Table) -> Any:
    """Rows with a key span whose label names a mistake."""
    spans: Any = table["spans"].combine_chunks()
    kinds: Any = pc.struct_field(pc.list_flatten(spans), "kind")
    keys = pc.is_in(kinds, value_set=pa.array([str(SpanKind.KEY)]))
    mask = np.zeros(len(table), dtype=bool)
    mask[pc.list_parent_indices(spans).filter(keys).to_numpy()] = True
    return pc.and_(_mistakes(table), pa.array(mask))


PROBLEMS = make_contract(
    "problems",
    1,
    [
        _PROBLEM_ID,
        described(
            "problem", _string, "The problem as the student sees it, without prompt template."
        ),
        described("answer", _string, "Gold final answer; the letter for multiple choice."),
        described("answer_kind", _string, "How answers are compared: math, choice or text."),
        described(
            "solution",
            _string,
            "Reference solution: the annotator sees it, TRACE's teacher never, a baseline's under "
            "routing.teacher_context=solution.",
            True,
        ),
        described(
            "steps",
            pa.list_(
                pa.struct(
                    [
                        described("text", _string, "The step as a correct response writes it."),
                        described("value", _string, "The value that the step establishes."),
                        described("type", _string, "The step's label of DiagnosticType."),
                        described("key", _bool, "Whether the step is critical to the solution."),
                    ]
                )
            ),
            "Known intermediate steps in order, for the rule annotator.",
            True,
        ),
        described("source", _string, "Where the problem comes from."),
        described("split", _string, "Split of the source: train, validation or test."),
        described("source_id", _string, "The row's own id in its source.", True),
        described("subject", _string, "The subject, as the source names it.", True),
        described("level", _string, "The difficulty, as the source gives it.", True),
        described(
            "metadata",
            _string,
            "What rewards need besides the answer, a JSON object: tests of a program, the settings "
            "of a task. No prompt shows it.",
            True,
        ),
    ],
    "problem_id",
    labels={"answer_kind": AnswerKind},
    optional=("source_id", "subject", "level", "metadata"),
    faults=(
        (
            "metadata",
            "is no JSON object; write a mapping as JSON text, or null",
            no_json_objects,
        ),
    ),
)

ROLLOUTS = make_contract(
    "rollouts",
    1,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        described("sample_index", _int32, "Index of the response in its group, from 0."),
        *_TOKENS,
        described(
            "response", _string, "The response's text: the bytes of token_ids without specials."
        ),
        described("finish_reason", _string, "stop or length."),
        *_POLICY,
        described("temperature", _float32, "Sampling temperature."),
        described("top_p", _float32, "Nucleus threshold; 1 is off."),
        described("top_k", _int32, "Top-k; 0 is off."),
        described("max_new_tokens", _int32, "Limit on response tokens."),
        described("seed", pa.int64(), "The sample's own seed."),
        described(
            "on_policy",
            _bool,
            "Whether ids and log-probabilities are the sampler's own; rows without them can be "
            "annotated and evaluated but not trained on.",
        ),
    ],
    "rollout_id",
    labels={"finish_reason": FinishReason},
    same_length=(("token_ids", "logprobs"),),
    ranges=_TOKEN_RANGES,
)

VERDICTS = make_contract(
    "verdicts",
    1,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        described(
            "reward", _float32, "1 correct, 0 wrong; null: the response is not scored.", True
        ),
        _CORRECT,
        described("parsed_answer", _string, "Final answer read from the response.", True),
        described("status", _string, "How the verification ended (VerdictStatus)."),
        described("verifier", _string, "Verifier and version."),
        described("seconds", _float32, "Time that the verification took."),
        described("feedback", _string, "What a reward of one's own reports.", True),
        described(
            "parts",
            pa.list_(
                pa.struct(
                    [
                        described("name", _string, "The part's name in verify.rewards."),
                        described("value", _float32, "Its value, 0 … 1; null: it has none.", True),
                        described("status", _string, "How it ended (VerdictStatus)."),
                        described("seconds", _float32, "Time that it took."),
                    ]
                )
            ),
            "The parts of verify.rewards in order, whose weighted mean is the reward; empty for a "
            "truncated response.",
            True,
        ),
        described(
            "selection",
            _string,
            "What stage select decides (Selection); tables without the column: annotate.",
        ),
        described(
            "left_out", _string, "Why stage select does not select it (LeftOut); else null.", True
        ),
    ],
    "rollout_id",
    optional=("feedback", "parts", "selection", "left_out"),
    labels={"status": VerdictStatus, "selection": Selection, "left_out": LeftOut},
    ranges={"reward": (-_MOST, _MOST)},
    faults=(
        (
            "correct",
            "is null in a row with a reward; say whether the response is right",
            lambda table: pc.and_(pc.is_valid(table["reward"]), pc.is_null(table["correct"])),
        ),
        ("parts", "has a value that is not in 0 … 1, or an unknown status", odd_parts),
    ),
)

ANNOTATIONS = make_contract(
    "annotations",
    1,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        _CORRECT,
        described(
            "segments",
            pa.list_(
                pa.struct(
                    [
                        described("start", _int32, "First character, in Unicode code points."),
                        described("end", _int32, "One past the last character."),
                    ]
                )
            ),
            "The response cut into segments; their texts concatenated are the response.",
        ),
        described(
            "spans",
            pa.list_(
                pa.struct(
                    [
                        described(
                            "segments", pa.list_(_int32), "Consecutive segment indices, from 0."
                        ),
                        described("kind", _string, "key or error."),
                        described("rank", _int32, "The annotator's order of importance, from 0."),
                        described("start", _int32, "First character in the response."),
                        described("end", _int32, "One past the last character."),
                        described("text", _string, "The span's text."),
                    ]
                )
            ),
            "Marked spans in order of rank.",
        ),
        _TYPE,
        described("status", _string, "How the annotation ended (AnnotationStatus)."),
        described("annotator_name", _string, "The annotator's name in its config."),
        described("annotator_model", _string, "The model behind it."),
        described("prompt_version", _string, "Version of the annotation prompt; empty for rules."),
        described("raw_answer", _string, "The annotator's answer as received.", True),
        described("error", _string, "Why the answer is invalid or the call failed.", True),
        described(
            "prompt_tokens",
            _int32,
            "Billed prompt tokens, corrective turns included. Rows with the same question share "
            "one answer: the first of them has its tokens, cost and time, the others have 0.",
            True,
        ),
        described("completion_tokens", _int32, "Billed completion tokens, as prompt_tokens.", True),
        described(
            "cost_usd",
            pa.float64(),
            "US dollars of the answers that this row is the first to have, so that the column sums "
            "to the dataset's cost; null if the price is unknown.",
            True,
        ),
        described("latency_s", _float32, "Seconds from request to answer, as prompt_tokens."),
        described(
            "reflection",
            _string,
            "The annotator's corrective idea, for the teacher context reflection; TRACE's teacher "
            "never sees it.",
            True,
        ),
    ],
    "rollout_id",
    optional=("reflection",),
    labels={"status": AnnotationStatus, "diagnostic_type": TYPE_LABELS},
    nested_labels={("spans", "kind"): SpanKind},
    faults=(
        (
            "segments",
            "does not follow the segment before from character 0, or has a null; cut the response "
            "so that the segments cover it",
            torn_segments,
        ),
        (
            "spans",
            "has a span that names no segment of this row, or whose start and end are not those of "
            "its segments, or a null",
            misplaced_spans,
        ),
        (*_NO_MISTAKE, _mistake_in_right),
        (*_NO_MISTAKE, _mistake_in_key),
    ),
)

ROUTED = make_contract(
    "routed",
    2,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        described(
            "problem", _string, "The problem; TRACE's teacher sees it and the type label only."
        ),
        *_TOKENS,
        described("temperature", _float32, "Sampling temperature that logprobs refer to."),
        described("reward", _float32, "The verifier's reward, shaped by routing.overlong."),
        described(
            "advantage",
            _float32,
            "(reward − group mean) / (group std + ε); under routing.advantage mean not divided.",
        ),
        described("correct", _bool, "Whether the response is right."),
        described("truncated", _bool, "Whether the response hit the token limit."),
        described(
            "route",
            list_of(pa.uint8()),
            f"Route of each response token: {_ROUTES}. A token belongs "
            "to the segment that holds most of its bytes, ties to the earlier one.",
        ),
        described(
            "span_id",
            list_of(pa.int16()),
            "Rank of the span that a token is routed for, −1 for none; rules that follow no span "
            "have a single span 0, which is not the annotator's.",
        ),
        _TYPE,
        described(
            "teacher_context",
            _string,
            "What the teacher of a baseline sees besides the problem; null under the type label.",
            True,
        ),
        described(
            "coverage",
            _float32,
            "Share of response tokens with a span; at most α except for rules all and "
            "from_first_span and your own.",
        ),
        described(
            "dropped_tokens",
            _int32,
            "Marked tokens that the rule left out; under rule spans those beyond the α cap.",
        ),
        *_POLICY,
        described(
            "contrast_contexts",
            list_of(_string),
            "What the teacher sees instead of teacher_context, for comparison: one text, or "
            "several whose probabilities are averaged; null without routing.contrast_context.",
            True,
        ),
    ],
    "rollout_id",
    optional=("contrast_contexts",),
    labels={"diagnostic_type": TYPE_LABELS},
    codes={"route": Route},
    same_length=(("token_ids", "logprobs", "route", "span_id"),),
    ranges=_TOKEN_RANGES | {"reward": (-_MOST, _MOST), "advantage": (-_MOST, _MOST)},
    filled=("prompt_token_ids", "token_ids"),
    faults=(
        (
            "diagnostic_type",
            "is null, and so is teacher_context, in a row with routed tokens; give the row its "
            "type, "
            "or route 0 to all its tokens",
            _untaught,
        ),
        (
            "contrast_contexts",
            "is null or empty in a row with reweighted tokens; give the row its contrast, or drop "
            "the column",
            _uncompared,
        ),
        (*_NO_MISTAKE, _mistake_in_right),
    ),
)

SCORES = make_contract(
    "scores",
    1,
    [
        _ROLLOUT_ID,
        described(
            "positions", list_of(_int32), "The routed tokens' places in the response, ascending."
        ),
        described(
            "top_token_ids",
            list_of(_int32),
            "The teacher's k likeliest tokens at each of them, likeliest first, k a position.",
        ),
        described(
            "top_logprobs",
            list_of(_float32),
            "Their log-probabilities, nats; −9999 for a token without probability.",
        ),
        described(
            "tail_logprobs",
            list_of(_float32),
            "Log-probability of all other tokens together, one a position, nats; −9999 for none.",
        ),
        described(
            "logprobs", list_of(_float32), "Log-probability of the response's token, a position."
        ),
        described("temperature", _float32, "Divides the teacher's logits."),
        described("teacher_name", _string, "Name of the teacher's model."),
        described("teacher_revision", _string, "Hash of its files; of a server's, its name."),
        described("teacher_entropy", list_of(_float32), "Of the teacher, a position, nats.", True),
        described(
            "student_entropy", list_of(_float32), "Of score.student, a position, nats.", True
        ),
        described("divergence", list_of(_float32), "KL(student‖teacher), a position, nats.", True),
    ],
    "rollout_id",
    optional=("teacher_entropy", "student_entropy", "divergence"),
    same_length=(
        ("positions", "tail_logprobs", "logprobs"),
        ("top_token_ids", "top_logprobs"),
    ),
    ranges={
        "positions": (0, MOST_TOKEN_ID),
        "top_token_ids": (0, MOST_TOKEN_ID),
        "top_logprobs": (-_MOST, MOST_LOGPROB),
        "tail_logprobs": (-_MOST, MOST_LOGPROB),
        "logprobs": (-_MOST, MOST_LOGPROB),
        "temperature": (0, _MOST),
        "teacher_entropy": (-MOST_LOGPROB, _MOST),
        "student_entropy": (-MOST_LOGPROB, _MOST),
        "divergence": (-MOST_LOGPROB, _MOST),
    },
    faults=(
        (
            "top_token_ids",
            "has not equally many tokens at each position; make the table again",
            _uneven_scores,
        ),
        ("positions", "does not ascend; make the table again", _unordered_positions),
        *(
            (name, "has another length than positions", _misfit(name))
            for name in ("teacher_entropy", "student_entropy", "divergence")
        ),
    ),
)

CONTRACTS = {
    c.name: c for c in (PROBLEMS, ROLLOUTS, VERDICTS, ANNOTATIONS, ROUTED, SCORES, EVALUATIONS)
}
