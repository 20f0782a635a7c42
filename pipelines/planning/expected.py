"""Datasets that a pipeline will make, so that every stage's own checks run before any work.

pipeline_plan.py gives an `ExpectingStore` to the stages' `begin`. It finds the finished datasets of
the real store, and the expected ones of the stages before. An expected dataset has the id that the
real one will get. It holds what can be known now: problems completely, and of the other tables one
row with the policy that will have made them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ...data.dataset import Dataset, Draft, get_dataset
from ...data.store import Store
from ...schemas.contract import TableContract
from ...schemas.errors import InputError


@dataclass(frozen=True)
class ExpectedDataset(Dataset):
    """A dataset whose parts are not made yet. tables: what is known of each part."""

    tables: Sequence[pa.Table]
    expected: Mapping[str, Dataset]

    def read_part(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        table = self.tables[index]
        for name in set(columns or ()) - set(table.column_names):
            assert self.contract is not None, "it has parts"
            kind = self.contract.schema.field(name).type
            table = table.append_column(name, pa.nulls(len(table), kind))
        return table.select(list(columns)) if columns else table

    def input(self, role: str) -> Dataset:
        ref = self.manifest["inputs"][role]
        return self.expected.get(ref) or get_dataset(self.files, ref)


class ExpectingStore(Store):
    """A store that finds expected datasets too. Nothing is written."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root)
        self.expected: dict[str, Dataset] = {}

    def get(self, ref: str, table: TableContract | None = None) -> Dataset:
        if (found := self.expected.get(ref)) is None:
            return super().get(ref, table)
        if table is not None and found.manifest["table"] != table.name:
            raise InputError(
                f"dataset {ref!r} will hold {found.manifest['table']}, not {table.name}"
            )
        return found

    def expect(self, draft: Draft, rows: Sequence[int], tables: Sequence[pa.Table]) -> Dataset:
        """Add the dataset that a draft will become. rows: of each part."""
        made = ExpectedDataset(
            self.files,
            draft.stage,
            draft.id,
            draft.header
            | {
                "config": draft.header["config"],
                "parts": [{"rows": count} for count in rows],
                "files": [],
                "summary": {},
            },
            tables,
            self.expected,
        )
        self.expected[made.ref] = made
        return made


def known_row(policy: str, fingerprint: str, trainable: bool = True) -> pa.Table:
    """One row of any table after the problems: its policy, no tokens yet, and no fault.

    trainable: whether rows will have token ids, as far as is known.
    """
    no_ids = pa.array([[]], pa.list_(pa.int32()))
    columns: dict[str, Any] = {
        "rollout_id": pa.array([""]),
        "policy_name": pa.array([policy]),
        "vocab_fingerprint": pa.array([fingerprint]),
        "policy_step": pa.array([0], pa.int32()),
        "on_policy": pa.array([trainable]),
        "prompt_token_ids": no_ids,
        "token_ids": no_ids,
        "status": pa.array(["ok"]),
        "reward": pa.array([1.0], pa.float32()),
        "advantage": pa.array([1.0], pa.float32()),
        "route": pa.array([[1]], pa.list_(pa.uint8())),
    }
    return pa.table(columns)
