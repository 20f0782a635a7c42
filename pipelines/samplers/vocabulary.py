"""Checks that a table's token ids belong to a policy; stages convert and train call them."""

import pyarrow as pa

from ...schemas.contract import outside
from ...schemas.errors import InputError


def check_vocabulary(table: pa.Table, expected: str, policy: str) -> None:
    """Raises InputError unless the table's token ids belong to the policy's vocabulary."""
    makers = {
        row["policy_name"]: row["vocab_fingerprint"]
        for row in table.select(["policy_name", "vocab_fingerprint"]).to_pylist()
    }
    if set(makers.values()) - {"", expected}:
        raise InputError(
            f"policy {policy}: has another vocabulary than the one that made the token ids "
            f"({', '.join(sorted(makers))}); name that policy or sample again"
        )


def check_token_ids(table: pa.Table, vocab_size: int, where: str) -> None:
    """Raises InputError unless the policy knows all token ids of the prompts and responses."""
    for name in ("prompt_token_ids", "token_ids"):
        if (row := outside(table.column(name), 0, vocab_size - 1)) is not None:
            raise InputError(
                f"{where}, row {row}: {name} has a token id outside the policy's 0 … "
                f"{vocab_size - 1}; name the policy that sampled it, or sample again"
            )
