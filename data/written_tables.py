"""Tables written by hand become datasets.

    trace-opd import annotations mine.parquet --of demo-verdicts --alias mine

    from trace_opd.data.store import Store
    from trace_opd.data.written_tables import import_table

    import_table(Store("store"), "annotations", table, of="demo-verdicts", alias="mine")

Rows are checked against the table's contract and against the dataset that they belong to, put into
its order and cut into its parts, which later stages read together. docs/your-own.md shows it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas.contract import TableContract, description, validate
from ..schemas.errors import InputError
from ..schemas.labels import FinishReason, VerdictStatus
from ..schemas.tables import ANNOTATIONS, PROBLEMS, ROLLOUTS, VERDICTS
from .parts import encoded
from .store import Dataset, Draft, Store
from .written_files import read_written


@dataclass(frozen=True)
class _Kind:
    """A table that can be written by hand.

    of: the table that its rows belong to, by column `key`; copied: columns that come from there;
    defaults: of columns that the table may lack.
    """

    contract: TableContract
    stage: str
    of: TableContract
    role: str
    key: str
    copied: tuple[str, ...]
    defaults: dict[str, Any]


_UNKNOWN_ROLLOUT = {
    "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": FinishReason.STOP,
    "policy_name": "hand", "policy_revision": "", "policy_step": 0, "vocab_fingerprint": "",
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 0, "seed": 0,
    "on_policy": False,
}  # fmt: skip
_UNKNOWN_VERDICT = {
    "parsed_answer": None, "status": VerdictStatus.OK, "verifier": "hand", "seconds": 0.0,
}  # fmt: skip
_UNKNOWN_ANNOTATION = {
    "annotator_name": "hand", "annotator_model": "hand", "prompt_version": "", "raw_answer": None,
    "error": None, "prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0, "latency_s": 0.0,
}  # fmt: skip
_IDS = ("problem_id", "group_id")
KINDS = {
    kind.contract.name: kind
    for kind in (
        _Kind(ROLLOUTS, "rollout", PROBLEMS, "problems", "problem_id", (), _UNKNOWN_ROLLOUT),
        _Kind(VERDICTS, "verify", ROLLOUTS, "rollouts", "rollout_id", _IDS, _UNKNOWN_VERDICT),
        _Kind(
            ANNOTATIONS,
            "annotate",
            VERDICTS,
            "verdicts",
            "rollout_id",
            (*_IDS, "correct"),
            _UNKNOWN_ANNOTATION,
        ),
    )
}


def import_file(store: Store, name: str, path: str, of: str, alias: str) -> Dataset:
    """`import_table` of a Parquet, JSONL or JSON file, or of Parquet files that a glob matches.

    Raises:
        InputError: names the file, the row (from 0) and the column at fault.
    """
    table, where = read_written(path, _kind(name).contract)
    return import_table(store, name, table, of, alias, where)


def import_table(
    store: Store, name: str, table: Any, of: str, alias: str, where: str = "table"
) -> Dataset:
    """A dataset of a table that was not made by a stage.

    name: rollouts, verdicts or annotations; table: of Arrow or polars; of: the problems, rollouts
    or verdicts dataset that the rows belong to; alias: the dataset's name.

    Columns that follow from `of` and those that say how rows were made may be left out.

    Raises:
        InputError: names `where`, the row (from 0) and the column at fault.
    """
    kind = _kind(name)
    table = table if isinstance(table, pa.Table) else table.to_arrow()
    base = store.get(of, kind.of)
    made_of = base.read()
    place = _places(kind, table, made_of, base, where)
    table = _completed(kind, table, made_of, place, where)
    checked = validate(table, kind.contract, where)
    inputs = _inputs(kind, base)
    if name == "annotations":
        _check_texts(checked, inputs["rollouts"], where)
    order = np.argsort(place, kind="stable")
    checked, place = checked.take(order), place[order]
    content = sha256(encoded(checked)).hexdigest()
    semantic = {"import": {"layout": name, "sha256": content}}
    config = {"import": semantic["import"] | {"file": where}}
    target = store.begin(kind.stage, semantic, inputs, kind.contract, config)
    with target.locked(lambda who: None) if isinstance(target, Draft) else nullcontext(target) as d:
        dataset = d if isinstance(d, Dataset) else _written(d, checked, place, base)
    store.set_alias(alias, dataset)
    return dataset


def _kind(name: str) -> _Kind:
    if name not in KINDS:
        raise InputError(f"table {name!r}: is none of {', '.join(KINDS)}")
    return KINDS[name]


def _inputs(kind: _Kind, base: Dataset) -> dict[str, Dataset]:
    """The inputs that the table's stage records."""
    inputs = {kind.role: base}
    if kind.contract is ANNOTATIONS:
        rollouts = base.input("rollouts")
        inputs |= {"rollouts": rollouts, "problems": rollouts.input("problems")}
    return inputs


def _places(
    kind: _Kind, table: pa.Table, made_of: pa.Table, base: Dataset, where: str
) -> np.ndarray:
    """(rows,) the row of `made_of` that each row belongs to.

    Raises:
        InputError: a row that belongs to none; under a table with one row each, also a missing one.
    """
    key = kind.key
    if key not in table.column_names:
        field = kind.contract.schema.field(key)
        raise InputError(f"{where}: column {key} is missing ({description(field)})")
    try:
        keys = table[key].cast(pa.string())
    except pa.ArrowException:
        raise InputError(f"{where}: column {key} is {table[key].type}, not text") from None
    known = made_of[key].combine_chunks()
    found = pc.index_in(keys, value_set=known)
    if found.null_count:
        row = pc.index(pc.is_null(found), True).as_py()
        raise InputError(
            f"{where}, row {row}: {key} {keys[row].as_py()} is not in {base.ref}; take the ids "
            "from there"
        )
    places = np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)
    if key == kind.contract.row_id and len(missing := np.setdiff1d(np.arange(len(known)), places)):
        raise InputError(
            f"{where}: {len(missing)} of the {len(known)} rows of {base.ref} are missing, first "
            f"{key} {known[int(missing[0])].as_py()}; give each a row"
            + ("" if kind.contract is VERDICTS else ", with status skipped if it is not annotated")
        )
    return places


def _completed(
    kind: _Kind, table: pa.Table, made_of: pa.Table, place: np.ndarray, where: str
) -> pa.Table:
    """With the columns that follow from `made_of`, and the defaults."""
    for name in kind.copied:
        copied = made_of[name].take(place)
        if name not in table.column_names:
            table = table.append_column(kind.contract.schema.field(name), copied)
        elif table[name].to_pylist() != copied.to_pylist():
            own, theirs = table[name].to_pylist(), copied.to_pylist()
            row = next(i for i, one in enumerate(own) if one != theirs[i])
            raise InputError(
                f"{where}, row {row}: {name} is {own[row]!r}, the dataset that it belongs to has "
                f"{theirs[row]!r}; leave the column out, or mend it"
            )
    defaults = dict(kind.defaults)
    if kind.contract is ROLLOUTS:
        defaults = {"group_id": table["problem_id"]} | defaults
    for name, value in defaults.items():
        if name not in table.column_names:
            field = kind.contract.schema.field(name)
            column = value if isinstance(value, pa.ChunkedArray) else None
            if column is None:
                column = pa.array([value] * len(table), field.type)
            table = table.append_column(name, column)
    if kind.contract is ROLLOUTS and "sample_index" not in table.column_names:
        seen: Counter[Any] = Counter()
        index = []
        for group in table["group_id"].to_pylist():
            index.append(seen[group])
            seen[group] += 1
        table = table.append_column("sample_index", pa.array(index, pa.int32()))
    return table


def _check_texts(annotations: pa.Table, rollouts: Dataset, where: str) -> None:
    """Raises InputError if segments do not cover a response, or a span has another text."""
    responses: dict[str, str] = {}
    for part in range(rollouts.parts):
        table = rollouts.read_part(part, ["rollout_id", "response"])
        responses |= zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    columns = ["rollout_id", "segments", "spans"]
    for index, row in enumerate(annotations.select(columns).to_pylist()):
        response = responses[row["rollout_id"]]
        if row["segments"] and row["segments"][-1]["end"] != len(response):
            raise InputError(
                f"{where}, row {index}: segments end at character {row['segments'][-1]['end']}, "
                f"the response at {len(response)}"
            )
        for span in row["spans"]:
            text = response[span["start"] : span["end"]]
            if span["text"] != text:
                raise InputError(
                    f"{where}, row {index}: spans.text is {span['text']!r:.80}, the response has "
                    f"{text!r:.80} there"
                )


def _written(draft: Draft, table: pa.Table, place: np.ndarray, base: Dataset) -> Dataset:
    """The dataset, with the parts of `base`."""
    for part, (begin, end) in enumerate(_cuts(base, place)):
        draft.write_part(part, table.slice(begin, end - begin))
    return draft.finish(base.parts, {"rows": len(table), "written_by_hand": True})


def _cuts(base: Dataset, place: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows that belong to each part of `base`."""
    ends = np.cumsum([part["rows"] for part in base.manifest["parts"]])
    cuts = np.searchsorted(place, np.concatenate(([0], ends)))
    return zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
