"""Arrow contracts of the tables that stages exchange, and the one function that checks them.

Every field carries a `description` in its metadata; every schema carries its table's name and
version. `validate` names the column and the row at fault.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .errors import InputError
from .labels import (
    AnnotationStatus,
    AnswerKind,
    DiagnosticType,
    FinishReason,
    Route,
    SpanKind,
    VerdictStatus,
)

NAME_KEY = b"trace_opd.table"
VERSION_KEY = b"trace_opd.version"


@dataclass(frozen=True)
class TableContract:
    """A table's name, version, Arrow schema, row id, closed label columns and aligned lists."""

    name: str
    version: int
    schema: pa.Schema
    row_id: str
    labels: dict[str, type[StrEnum]]
    same_length: tuple[tuple[str, ...], ...] = ()

    def empty(self) -> pa.Table:
        return self.schema.empty_table()

    def table(self, rows: Iterable[dict]) -> pa.Table:
        """Build a table of this contract from dictionaries, one per row."""
        return pa.Table.from_pylist(list(rows), schema=self.schema)


def _field(name: str, kind: pa.DataType, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable, metadata={"description": description})


def _contract(
    name: str,
    version: int,
    fields: list[pa.Field],
    row_id: str,
    labels: dict[str, type[StrEnum]] | None = None,
    same_length: tuple[tuple[str, ...], ...] = (),
) -> TableContract:
    metadata: dict[bytes | str, bytes | str] = {
        NAME_KEY: name.encode(),
        VERSION_KEY: str(version).encode(),
    }
    return TableContract(
        name, version, pa.schema(fields, metadata=metadata), row_id, labels or {}, same_length
    )


_string, _int32, _float32, _bool = pa.string(), pa.int32(), pa.float32(), pa.bool_()
_PROBLEM_ID = _field("problem_id", _string, "Hash of source, problem text and answer.")
_ROLLOUT_ID = _field(
    "rollout_id", _string, "Hash of problem, policy, sampling parameters and sample index."
)
_GROUP_ID = _field("group_id", _string, "Rollouts of one problem by one policy share it.")
_CORRECT = _field(
    "correct", _bool, "Whether the final answer equals the gold answer; null if unscored.", True
)
_TYPE = _field("diagnostic_type", _string, "One label of DiagnosticType; null without spans.", True)
_POLICY = [
    _field("policy_name", _string, "Name of the policy that sampled the response."),
    _field("policy_revision", _string, "Fingerprint of its weights."),
    _field("policy_step", _int32, "Optimiser steps that the weights had seen in this run."),
    _field("vocab_fingerprint", _string, "Hash of the vocabulary; empty if no ids are known."),
]
_TOKENS = [
    _field("prompt_token_ids", pa.list_(_int32), "The prompt's token ids as the sampler saw them."),
    _field("token_ids", pa.list_(_int32), "The sampler's own response ids, never re-encoded."),
    _field(
        "logprobs",
        pa.list_(_float32),
        "Natural-log probability of each response token under the sampling policy at the sampling "
        "temperature, before top-p and top-k.",
    ),
]

PROBLEMS = _contract(
    "problems",
    1,
    [
        _PROBLEM_ID,
        _field("problem", _string, "The problem as the student sees it, without prompt template."),
        _field("answer", _string, "Gold final answer; the letter for multiple choice."),
        _field("answer_kind", _string, "How answers are compared: math or choice."),
        _field(
            "solution",
            _string,
            "Reference solution: the annotator sees it, TRACE's teacher never, a baseline's where "
            "routing.teacher_context says so.",
            True,
        ),
        _field(
            "steps",
            pa.list_(
                pa.struct(
                    [
                        _field("text", _string, "The step, written as a right response writes it."),
                        _field("value", _string, "The value that the step establishes."),
                        _field("type", _string, "The step's label of DiagnosticType."),
                        _field("key", _bool, "Whether the step is critical to the solution."),
                    ]
                )
            ),
            "Known intermediate steps in order, for the rule annotator.",
            True,
        ),
        _field("source", _string, "Where the problem comes from."),
        _field("split", _string, "Split of the source: train, validation or test."),
    ],
    "problem_id",
    {"answer_kind": AnswerKind},
)

ROLLOUTS = _contract(
    "rollouts",
    1,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        _field("sample_index", _int32, "Index of the response in its group, from 0."),
        *_TOKENS,
        _field(
            "response", _string, "The response's text: the bytes of token_ids without specials."
        ),
        _field("finish_reason", _string, "stop or length."),
        *_POLICY,
        _field("temperature", _float32, "Sampling temperature."),
        _field("top_p", _float32, "Nucleus threshold; 1 is off."),
        _field("top_k", _int32, "Top-k; 0 is off."),
        _field("max_new_tokens", _int32, "Limit on response tokens."),
        _field("seed", pa.int64(), "The sample's own seed."),
        _field(
            "on_policy",
            _bool,
            "Whether ids and log-probabilities are the sampler's own; rows without them can be "
            "annotated and evaluated but not trained on.",
        ),
    ],
    "rollout_id",
    {"finish_reason": FinishReason},
    (("token_ids", "logprobs"),),
)

VERDICTS = _contract(
    "verdicts",
    1,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        _field(
            "reward", _float32, "1 right, 0 wrong; null: says nothing about the response.", True
        ),
        _CORRECT,
        _field("parsed_answer", _string, "Final answer read from the response.", True),
        _field("status", _string, "What the verifier can say (VerdictStatus)."),
        _field("verifier", _string, "Verifier and version."),
        _field("seconds", _float32, "Time that the verification took."),
    ],
    "rollout_id",
    {"status": VerdictStatus},
)

ANNOTATIONS = _contract(
    "annotations",
    1,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        _CORRECT,
        _field(
            "segments",
            pa.list_(
                pa.struct(
                    [
                        _field("start", _int32, "First character, in Unicode code points."),
                        _field("end", _int32, "One past the last character."),
                    ]
                )
            ),
            "The response cut into segments; their texts concatenated are the response.",
        ),
        _field(
            "spans",
            pa.list_(
                pa.struct(
                    [
                        _field(
                            "segments", pa.list_(_int32), "Consecutive segment indices, from 0."
                        ),
                        _field("kind", _string, "key or error."),
                        _field("rank", _int32, "The annotator's order of importance, from 0."),
                        _field("start", _int32, "First character in the response."),
                        _field("end", _int32, "One past the last character."),
                        _field("text", _string, "The span's text."),
                    ]
                )
            ),
            "Marked spans in order of rank.",
        ),
        _TYPE,
        _field("status", _string, "How the annotation ended (AnnotationStatus)."),
        _field("annotator_name", _string, "The annotator's name in its config."),
        _field("annotator_model", _string, "The model behind it."),
        _field("prompt_version", _string, "Version of the annotation prompt; empty for rules."),
        _field("raw_answer", _string, "The annotator's answer as received.", True),
        _field("error", _string, "Why the answer is invalid or the call failed.", True),
        _field("prompt_tokens", _int32, "Billed prompt tokens, corrective turns included.", True),
        _field("completion_tokens", _int32, "Billed completion tokens.", True),
        _field("cost_usd", pa.float64(), "US dollars; null if the price is unknown.", True),
        _field("latency_s", _float32, "Seconds from request to answer."),
    ],
    "rollout_id",
    {"status": AnnotationStatus, "diagnostic_type": DiagnosticType},
)

ROUTED = _contract(
    "routed",
    2,
    [
        _ROLLOUT_ID,
        _PROBLEM_ID,
        _GROUP_ID,
        _field(
            "problem", _string, "The problem: with the type label all that TRACE's teacher sees."
        ),
        *_TOKENS,
        _field("temperature", _float32, "Sampling temperature that logprobs refer to."),
        _field("reward", _float32, "The verifier's reward, shaped by routing.overlong."),
        _field(
            "advantage",
            _float32,
            "(reward − group mean) / (group std + ε); under routing.advantage mean not divided.",
        ),
        _field("correct", _bool, "Whether the response is right."),
        _field("truncated", _bool, "Whether the response hit the token limit."),
        _field(
            "route",
            pa.list_(pa.uint8()),
            "Route of each response token: grpo 0, fkl 1, rkl 2, jsd 3, reweight 4. A token belongs "
            "to the segment that holds most of its bytes, ties to the earlier one.",
        ),
        _field(
            "span_id",
            pa.list_(pa.int16()),
            "Rank of the span that a token is routed for, −1 for none; rules all, random and "
            "inverted have a single span 0, which is not the annotator's.",
        ),
        _TYPE,
        _field(
            "teacher_context",
            _string,
            "What the teacher of a baseline sees besides the problem; null under the type label.",
            True,
        ),
        _field(
            "coverage",
            _float32,
            "Share of response tokens with a span, at most α but for rule all and rules of your own.",
        ),
        _field(
            "dropped_tokens",
            _int32,
            "Marked tokens that the rule left out; under rule spans those beyond the α cap.",
        ),
        *_POLICY,
    ],
    "rollout_id",
    {"diagnostic_type": DiagnosticType},
    (("token_ids", "logprobs", "route", "span_id"),),
)

EVALUATIONS = _contract(
    "evaluations",
    1,
    [
        _field("evaluation_id", _string, "Hash of problem, policy and sampling parameters."),
        _PROBLEM_ID,
        _field("source", _string, "Where the problem comes from."),
        _field("policy", _string, "Role of the policy in this evaluation."),
        _field("policy_name", _string, "Name of the policy."),
        _field("policy_revision", _string, "Fingerprint of its weights."),
        _field("k", _int32, "Scored samples of this problem."),
        _field("correct", _int32, "How many of them are right."),
        _field("majority_correct", _float32, "Probability that the majority answer is right."),
        _field("mean_tokens", _float32, "Mean response length in tokens."),
        _field("truncated", _int32, "Samples that hit the token limit."),
        _field("unscored", _int32, "Samples that the verifier could not score."),
    ],
    "evaluation_id",
)

CONTRACTS = {c.name: c for c in (PROBLEMS, ROLLOUTS, VERDICTS, ANNOTATIONS, ROUTED, EVALUATIONS)}


def validate(table: pa.Table, contract: TableContract, where: str = "table") -> pa.Table:
    """Check a table against its contract; return it cast to the contract's schema.

    Raises:
        InputError: names `where`, the column and the first row at fault.
    """
    metadata = table.schema.metadata or {}
    version = metadata.get(VERSION_KEY)
    if version is not None and int(version) != contract.version:
        raise InputError(
            f"{where}: is version {int(version)} of table {contract.name}, this release reads "
            f"version {contract.version}; make it again with this release"
        )
    for field in contract.schema:
        if field.name not in table.column_names:
            raise InputError(
                f"{where}: column {field.name} is missing; table {contract.name} needs it "
                f"({description(field)})"
            )
    if extra := sorted(set(table.column_names) - set(contract.schema.names)):
        raise InputError(
            f"{where}: column {extra[0]} is not in table {contract.name}; drop or rename it"
        )
    if table.num_columns > len(contract.schema):
        twice = max(table.column_names, key=table.column_names.count)
        raise InputError(f"{where}: column {twice} stands there twice; drop one of them")
    columns = []
    for field in contract.schema:
        column = table.column(field.name)
        try:
            column = column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise InputError(
                f"{where}: column {field.name} is {column.type}, table {contract.name} needs "
                f"{field.type} ({error})"
            ) from None
        if not field.nullable and column.null_count:
            raise _fault(where, field.name, pc.is_null(column), "is null; give it a value")
        columns.append(column)
    checked = pa.Table.from_arrays(columns, schema=contract.schema)
    _check_labels(checked, contract, where)
    _check_lengths(checked, contract, where)
    _check_unique(checked, contract, where)
    return checked


def description(field: pa.Field) -> str:
    """The description that a contract's field carries in its metadata."""
    return (field.metadata or {}).get(b"description", b"").decode()


def _fault(where: str, column: str, bad: Any, what: str) -> InputError:
    row = pc.index(bad, True).as_py()
    return InputError(f"{where}, row {row}: {column} {what}")


def _check_labels(table: pa.Table, contract: TableContract, where: str) -> None:
    for name, labels in contract.labels.items():
        column = table.column(name)
        known = pc.is_in(column, value_set=pa.array([str(label) for label in labels]))
        bad = pc.and_(pc.is_valid(column), pc.invert(known))
        if pc.any(bad).as_py():
            value = column[pc.index(bad, True).as_py()].as_py()
            allowed = ", ".join(labels)
            raise _fault(where, name, bad, f"is {value!r}, not one of {allowed}")
    if contract is ROUTED:
        routes = pc.list_flatten(table.column("route"))
        if len(routes) and (pc.max(routes).as_py() or 0) > max(Route):
            rows = pc.list_parent_indices(table.column("route").combine_chunks())
            bad_at = pc.index(pc.greater(routes, pa.scalar(int(max(Route)))), True).as_py()
            raise InputError(
                f"{where}, row {rows[bad_at].as_py()}: route is not in 0 … {int(max(Route))}"
            )
    if contract is ANNOTATIONS:
        spans = table.column("spans").combine_chunks()
        kinds = pc.struct_field(pc.list_flatten(spans), "kind")
        bad = pc.invert(pc.is_in(kinds, value_set=pa.array([str(kind) for kind in SpanKind])))
        if pc.any(bad).as_py():
            row = pc.list_parent_indices(spans)[pc.index(bad, True).as_py()].as_py()
            raise InputError(f"{where}, row {row}: spans.kind is not one of key, error")


def _check_lengths(table: pa.Table, contract: TableContract, where: str) -> None:
    for first, *others in contract.same_length:
        lengths = pc.list_value_length(table.column(first))
        for other in others:
            bad = pc.not_equal(lengths, pc.list_value_length(table.column(other)))
            if pc.any(bad).as_py():
                raise _fault(where, other, bad, f"has another length than {first}")


def _check_unique(table: pa.Table, contract: TableContract, where: str) -> None:
    ids = table.column(contract.row_id)
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: set[Any] = set()
    for row, value in enumerate(ids.to_pylist()):
        if value in seen:
            raise InputError(
                f"{where}, row {row}: {contract.row_id} {value} appears twice; drop the repeated row"
            )
        seen.add(value)
