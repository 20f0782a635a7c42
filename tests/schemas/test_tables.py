"""Table contracts: what `validate` accepts, and how its errors name the column and the row."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_opd.schemas.contract import NAME_KEY, VERSION_KEY, TableContract, description, validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import (
    ANNOTATIONS,
    CONTRACTS,
    PROBLEMS,
    ROLLOUTS,
    ROUTED,
    SCORES,
    VERDICTS,
)

_ids = {"problem_id": "p", "group_id": "g"}
_policy = {
    "policy_name": "micro",
    "policy_revision": "0",
    "policy_step": 0,
    "vocab_fingerprint": "v",
}
_tokens = {"prompt_token_ids": [1], "token_ids": [5, 6], "logprobs": [-0.5, -0.25]}
# One valid row of each table, without the row id.
ROWS: dict[str, dict] = {
    "problems": {
        "problem": "1+1",
        "answer": "2",
        "answer_kind": "math",
        "solution": "two",
        "steps": [{"text": "1+1=2", "value": "2", "type": "arithmetic", "key": True}],
        "source": "test",
        "split": "train",
        "source_id": "a/1",
        "subject": "Algebra",
        "level": "3",
        "metadata": '{"limit": 3}',
        "history": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": "1+0"},
            {"role": "assistant", "content": "1"},
        ],
    },
    "rollouts": {
        **_ids,
        **_tokens,
        **_policy,
        "sample_index": 0,
        "response": "2",
        "finish_reason": "stop",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 8,
        "seed": 1 << 40,
        "on_policy": True,
        "policy_mask": [True, False],
    },
    "verdicts": {
        **_ids,
        "reward": 1.0,
        "correct": True,
        "parsed_answer": "2",
        "status": "ok",
        "verifier": "test 1",
        "seconds": 0.0,
        "feedback": "by a reward of one's own",
        "selection": "plain",
        "left_out": "budget",
        "parts": [{"name": "math", "value": 1.0, "status": "ok", "seconds": 0.0}],
        "grades": [
            {
                "name": "judge",
                "repeat": 0,
                "order": "reference_first",
                "grade": 7,
                "status": "ok",
                "reason": "One step is missing.",
            }
        ],
    },
    "annotations": {
        **_ids,
        "correct": True,
        "segments": [{"start": 0, "end": 1}],
        "spans": [{"segments": [0], "kind": "key", "rank": 0, "start": 0, "end": 1, "text": "2"}],
        "diagnostic_type": "arithmetic",
        "status": "ok",
        "annotator_name": "rule",
        "annotator_model": "rule",
        "prompt_version": "",
        "raw_answer": "{}",
        "error": "none",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cost_usd": 0.0,
        "latency_s": 0.0,
        "reflection": "read the second line again",
    },
    "routed": {
        **_ids,
        **_tokens,
        **_policy,
        "problem": "1+1",
        "temperature": 1.0,
        "reward": 1.0,
        "advantage": 0.5,
        "correct": True,
        "truncated": False,
        "route": [0, 1],
        "span_id": [-1, 0],
        "diagnostic_type": "arithmetic",
        "teacher_context": "a solution",
        "coverage": 0.5,
        "dropped_tokens": 0,
        "contrast_contexts": ["a wrong response"],
        "policy_mask": [False, True],
        "history": [{"role": "user", "content": "1+0"}],
    },
    "scores": {
        "positions": [1, 4],
        "top_token_ids": [5, 6, 7, 5],
        "top_logprobs": [-0.25, -2.0, -0.5, -1.5],
        "tail_logprobs": [-2.5, -3.0],
        "logprobs": [-0.25, -6.0],
        "temperature": 1.0,
        "teacher_name": "micro",
        "teacher_revision": "0",
        "teacher_entropy": [0.5, 0.75],
        "student_entropy": [0.25, 1.0],
        "divergence": [0.0, 0.5],
    },
    "evaluations": {
        "problem_id": "p",
        "source": "test",
        "policy": "base",
        "policy_name": "micro",
        "policy_revision": "0",
        "k": 8,
        "correct": 4,
        "majority_correct": 0.5,
        "mean_tokens": 2.0,
        "truncated": 0,
        "unscored": 0,
    },
}

EVERY_COLUMN = [(c, field) for c in CONTRACTS.values() for field in c.schema]
COLUMN_IDS = [f"{c.name}.{field.name}" for c, field in EVERY_COLUMN]
every_contract = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
every_column = pytest.mark.parametrize(("contract", "field"), EVERY_COLUMN, ids=COLUMN_IDS)


def table_of(contract: TableContract, *changes: dict) -> pa.Table:
    """A valid table of three rows, or of one row per given change."""
    return contract.table(
        ROWS[contract.name] | {contract.row_id: f"id-{row}"} | change
        for row, change in enumerate(changes or ({}, {}, {}))
    )


def with_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def fields_within(field: pa.Field) -> list[pa.Field]:
    """A field and all fields nested in it."""
    kind = field.type
    if pa.types.is_list(kind):
        return [field, *fields_within(kind.value_field)[1:]]
    if pa.types.is_struct(kind):
        return [field, *(inner for child in kind for inner in fields_within(child))]
    return [field]


def test_a_table_may_lack_or_have_optional_columns():
    row = ROWS["problems"] | {"problem_id": "a"}
    plain = {k: v for k, v in row.items() if k not in PROBLEMS.optional}
    bare = PROBLEMS.table([plain])
    assert bare.schema == validate(bare, PROBLEMS).schema == PROBLEMS.schema_of(())
    some = PROBLEMS.table([plain, plain | {"problem_id": "b", "subject": "Algebra"}])
    assert validate(some, PROBLEMS)["subject"].to_pylist() == [None, "Algebra"]
    assert some.column_names == [*bare.column_names, "subject"]
    with pytest.raises(InputError, match="column level is list"):
        validate(bare.append_column("level", pa.array([["1"]])), PROBLEMS, "t")


@every_contract
def test_a_valid_table_passes_and_keeps_its_values(contract):
    table = table_of(contract)
    checked = validate(table, contract)
    assert checked.schema.equals(contract.schema, check_metadata=True)
    assert checked.to_pylist() == table.to_pylist()


@every_contract
def test_an_empty_table_passes(contract):
    assert validate(contract.empty(), contract).num_rows == 0


@every_column
def test_every_field_has_a_description(contract, field):
    for inner in fields_within(field):
        assert description(inner).endswith("."), inner.name


@every_contract
def test_schema_carries_name_and_version(contract):
    assert contract.schema.metadata[NAME_KEY].decode() == contract.name
    assert int(contract.schema.metadata[VERSION_KEY]) == contract.version


@every_column
def test_a_missing_column_is_named_with_its_meaning(contract, field):
    table = table_of(contract).drop_columns([field.name])
    if field.name in contract.optional:
        assert validate(table, contract).column_names == table.column_names
        return
    with pytest.raises(InputError) as error:
        validate(table, contract, "in.parquet")
    assert str(error.value).startswith(f"in.parquet: column {field.name} is missing")
    assert description(field) in str(error.value)


@every_column
def test_a_null_passes_only_in_a_nullable_column(contract, field):
    # A verdict may be null only without a reward.
    unscored = {"reward": None} if contract.name == "verdicts" else {}
    table = table_of(contract, {}, unscored, {})
    values = table.column(field.name).to_pylist()
    values[1] = None
    broken = with_column(table, field.name, pa.array(values, field.type))
    if field.nullable:
        assert validate(broken, contract).column(field.name)[1].as_py() is None
        return
    with pytest.raises(InputError, match=f"^in.parquet, row 1: {field.name} is null"):
        validate(broken, contract, "in.parquet")


@every_contract
def test_an_extra_column_is_named(contract):
    table = table_of(contract).append_column("notes", pa.array(["a", "b", "c"]))
    with pytest.raises(
        InputError, match=f"^in.parquet: column notes is not in table {contract.name}"
    ):
        validate(table, contract, "in.parquet")


@pytest.mark.parametrize(
    ("contract", "column", "values"),
    [
        (ROUTED, "route", pa.array([[0, 1], [0, 256], [0, 1]])),
        (ROLLOUTS, "token_ids", pa.array([[5.0, 6.0], [5.5, 6.0], [5.0, 6.0]])),
        (VERDICTS, "reward", pa.array(["1", "0", "good"])),
        (PROBLEMS, "problem", pa.array([["1"], ["2"], ["3"]])),
        (PROBLEMS, "problem", pa.array([{"text": "1"}, {"text": "2"}, {"text": "3"}])),
        (PROBLEMS, "steps", pa.array(["1", "2", "3"])),
        (PROBLEMS, "steps", pa.array([[{"text": "1"}], None, None])),
    ],
    ids=["overflow", "fraction", "words", "list", "struct", "string", "half-a-struct"],
)
def test_a_wrong_type_is_named(contract, column, values):
    table = with_column(table_of(contract), column, values)
    needed = contract.schema.field(column).type
    with pytest.raises(InputError) as error:
        validate(table, contract, "in.parquet")
    message = f"in.parquet: column {column} is {values.type}, table {contract.name} needs {needed}"
    assert str(error.value).startswith(message)


def test_a_duplicate_column_is_named():
    table = table_of(PROBLEMS).append_column("answer", pa.array(["1", "2", "3"]))
    with pytest.raises(InputError, match=r"^in\.parquet: column answer .*twice"):
        validate(table, PROBLEMS, "in.parquet")


def test_types_are_cast_where_no_value_changes():
    table = table_of(ROLLOUTS)
    wide = with_column(table, "response", table["response"].cast(pa.large_string()))
    wide = with_column(wide, "token_ids", table["token_ids"].cast(pa.list_(pa.int64())))
    assert validate(wide, ROLLOUTS) == table


@pytest.mark.parametrize(
    ("contract", "column", "allowed"),
    [
        (PROBLEMS, "answer_kind", "math, choice"),
        (ROLLOUTS, "finish_reason", "stop, length"),
        (VERDICTS, "status", "ok, pred_unparsed"),
        (ANNOTATIONS, "status", "ok, empty"),
        (ANNOTATIONS, "diagnostic_type", "case_analysis, "),
        (ROUTED, "diagnostic_type", "case_analysis, "),
    ],
)
def test_a_label_outside_its_enumeration_is_named_with_its_row(contract, column, allowed):
    table = table_of(contract, {}, {}, {column: "vibes"})
    with pytest.raises(InputError, match=f"^t, row 2: {column} is 'vibes', not one of {allowed}"):
        validate(table, contract, "t")


def test_an_unknown_route_is_named_with_its_row():
    table = table_of(ROUTED, {}, {"route": [0, 5]})
    with pytest.raises(InputError, match=r"^t, row 1: route is not in 0 … 4"):
        validate(table, ROUTED, "t")


def test_an_unknown_span_kind_is_named_with_its_row():
    (span,) = ROWS["annotations"]["spans"]
    table = table_of(ANNOTATIONS, {}, {"spans": []}, {"spans": [span, span | {"kind": "odd"}]})
    with pytest.raises(InputError, match=r"^t, row 2: spans.kind is not one of key, error"):
        validate(table, ANNOTATIONS, "t")


@pytest.mark.parametrize(
    ("contract", "first", "column"),
    [
        (c, names[0], name)
        for c in CONTRACTS.values()
        for names in c.same_length
        for name in names[1:]
    ],
)
def test_lists_of_unequal_length_are_named_with_their_row(contract, first, column):
    values = ROWS[contract.name][column]
    table = table_of(contract, {}, {column: [*values, values[-1]]})
    with pytest.raises(InputError, match=f"^t, row 1: {column} has another length than {first}"):
        validate(table, contract, "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_token_ids": [1, 2, 3], "top_logprobs": [-1.0] * 3}, "top_token_ids has not equally"),
        ({"top_token_ids": [], "top_logprobs": []}, "top_token_ids has not equally many tokens"),
        ({"positions": [4, 1]}, "positions does not ascend"),
        ({"positions": [1, 1]}, "positions does not ascend"),
        ({"student_entropy": [0.5]}, "student_entropy has another length than positions"),
        ({"divergence": [-0.5, 0.5]}, "divergence has a number that is not finite, or not in"),
        ({"tail_logprobs": [-math.inf, -1.0]}, "tail_logprobs has a number that is not finite"),
    ],
)
def test_scores_that_fit_no_positions_are_named_with_their_row(change, message):
    nothing = {name: [] for name, value in ROWS["scores"].items() if isinstance(value, list)}
    unknown = dict.fromkeys(("teacher_entropy", "student_entropy", "divergence"))
    validate(table_of(SCORES, {}, nothing, unknown), SCORES, "t")
    with pytest.raises(InputError, match=f"^t, row 2: {message}"):
        validate(table_of(SCORES, nothing, {}, change), SCORES, "t")


@pytest.mark.parametrize(
    ("contract", "column"),
    [
        (c, name)
        for c in (ROLLOUTS, ROUTED)
        for name in ("prompt_token_ids", "token_ids", "logprobs")
    ]
    + [(ROUTED, "route"), (ROUTED, "span_id")],
)
def test_an_entry_that_is_null_is_named_with_its_row(contract, column):
    values = ROWS[contract.name][column]
    table = table_of(contract, {}, {})
    entries = table.schema.field(column).type.value_type
    chunks = [[values], [[*values[:-1], None]]]
    table = with_column(table, column, pa.chunked_array(chunks, pa.list_(entries)))
    with pytest.raises(InputError, match=f"^t, row 1: {column} has an entry that is null"):
        validate(table, contract, "t")


@every_contract
def test_a_duplicate_id_is_named_with_its_row(contract):
    table = table_of(contract, {}, {contract.row_id: "same"}, {}, {contract.row_id: "same"})
    with pytest.raises(InputError, match=f"^t, row 3: {contract.row_id} same appears twice"):
        validate(table, contract, "t")


def test_rows_are_counted_over_the_chunks_of_a_table():
    table = pa.concat_tables([table_of(PROBLEMS), table_of(PROBLEMS, {"problem_id": "id-9"})])
    broken = with_column(
        table, "answer_kind", pa.chunked_array([["math", "math", "math"], ["odd"]])
    )
    with pytest.raises(InputError, match=r"^t, row 3: answer_kind is 'odd'"):
        validate(broken, PROBLEMS, "t")


@every_contract
def test_another_version_is_refused(contract):
    newer = table_of(contract).replace_schema_metadata(
        {NAME_KEY: contract.name, VERSION_KEY: str(contract.version + 1)}
    )
    with pytest.raises(InputError, match=f"is version {contract.version + 1} of table") as error:
        validate(newer, contract, "old.parquet")
    assert f"reads version {contract.version}" in str(error.value)


@every_contract
def test_parquet_keeps_descriptions_name_and_version(contract, tmp_path):
    pq.write_table(table_of(contract), tmp_path / "t.parquet")
    read = pq.read_table(tmp_path / "t.parquet")
    assert read.schema.metadata[VERSION_KEY] == str(contract.version).encode()
    for field in contract.schema:
        assert description(read.schema.field(field.name)) == description(field)
    assert validate(read, contract).to_pylist() == table_of(contract).to_pylist()


NUMBERS = [
    *((c, name, [0, bad]) for c in (ROLLOUTS, ROUTED) for name in ("token_ids", "prompt_token_ids")
      for bad in (-1, -(2**31))),
    *((c, "logprobs", [-1.0, bad]) for c in (ROLLOUTS, ROUTED)
      for bad in (5.0, 0.01, math.nan, math.inf, -math.inf)),
    *((c, "temperature", bad) for c in (ROLLOUTS, ROUTED) for bad in (-1.0, math.nan, math.inf)),
    *((ROUTED, name, bad) for name in ("advantage", "reward") for bad in (math.nan, -math.inf)),
    (VERDICTS, "reward", math.nan),
]  # fmt: skip


@pytest.mark.parametrize(("contract", "column", "value"), NUMBERS)
def test_a_number_that_cannot_be_is_named_with_its_row(contract, column, value):
    table = table_of(contract, {}, {}, {column: value})
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    for made in (table, chunked):
        with pytest.raises(InputError, match=f"^t, row 2: {column} has a number"):
            validate(made, contract, "t")


def test_a_log_probability_above_zero_by_rounding_alone_is_kept():
    table = table_of(ROUTED, {"logprobs": [1e-6, 0.0]})
    assert validate(table, ROUTED).num_rows == 1


def test_a_routed_token_needs_something_that_its_teacher_sees():
    bare = {"diagnostic_type": None, "teacher_context": None}
    plain, routed = {"route": [0, 0]}, {"route": [0, 2]}
    fine = table_of(ROUTED, bare | plain, routed, routed | bare | {"teacher_context": "4"})
    assert validate(fine, ROUTED).num_rows == 3
    with pytest.raises(InputError, match=r"^t, row 2: diagnostic_type is null, and so"):
        validate(table_of(ROUTED, routed, bare | plain, bare | routed, bare | routed), ROUTED, "t")


@pytest.mark.parametrize("column", ["prompt_token_ids", "token_ids"])
def test_a_sequence_without_tokens_is_named_with_its_row(column):
    tokens = ("token_ids", "logprobs", "route", "span_id", "policy_mask")
    lists = tokens if column == "token_ids" else (column,)
    with pytest.raises(InputError, match=f"^t, row 1: {column} is empty"):
        validate(table_of(ROUTED, {}, {name: [] for name in lists}), ROUTED, "t")


def test_only_the_errors_of_wrong_responses_may_be_named_as_mistakes():
    (span,) = ROWS["annotations"]["spans"]
    named = {"diagnostic_type": "omitted_case"}
    wrong = named | {"correct": False, "spans": [span | {"kind": "error"}]}
    assert validate(table_of(ANNOTATIONS, {}, wrong), ANNOTATIONS).num_rows == 2
    plain = wrong | {"diagnostic_type": "case_analysis"}  # as older tables have it
    assert validate(table_of(ANNOTATIONS, plain), ANNOTATIONS).num_rows == 1
    sentence = r"^t, row 1: diagnostic_type names a mistake, and the response is right or has key"
    for bad in (wrong | {"correct": True}, wrong | {"spans": [span]}):
        with pytest.raises(InputError, match=sentence):
            validate(table_of(ANNOTATIONS, {}, bad), ANNOTATIONS, "t")
    routed = named | {"correct": False}
    assert validate(table_of(ROUTED, {}, routed), ROUTED).num_rows == 2
    with pytest.raises(InputError, match=sentence):
        validate(table_of(ROUTED, {}, named), ROUTED, "t")


@pytest.mark.parametrize(
    "change", [{"value": 1.5}, {"value": float("nan")}, {"value": -0.5}, {"status": "fine"}]
)
def test_a_part_of_a_reward_has_a_value_from_0_to_1_and_a_known_status(change):
    row = ROWS["verdicts"] | {"rollout_id": "a"}
    table = VERDICTS.table([row, row | {"rollout_id": "b", "parts": [row["parts"][0] | change]}])
    with pytest.raises(InputError, match="row 1: parts has a value"):
        validate(table, VERDICTS)
