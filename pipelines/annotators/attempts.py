"""Attempts of an annotation: a repeated command asks again for rows without an answer.

Stage annotate and its estimate call this file. A finished dataset is never rewritten, because
others refer to it by its id. The repeated command makes another dataset, whose semantic config has
the attempt's number (attempt 0 has none). All attempts share attempt 0's journal, batches and
budget.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...data.dataset import dataset_id
from ...data.store import Dataset, Draft, Store
from ...schemas.tables import ANNOTATIONS

UNANSWERED = "unanswered"  # key in a dataset's summary: rows that may succeed in another attempt
_ATTEMPT = "attempt"


def current_attempt(
    store: Store, semantic: dict[str, Any], inputs: Mapping[str, Dataset], keep_failed: bool
) -> dict[str, Any]:
    """The semantic config of a command's attempt: the first without unanswered rows, or a new one.

    keep_failed: return the last finished attempt instead, even with unanswered rows.
    """
    number, last_finished = 0, None
    while True:
        numbered = semantic | ({_ATTEMPT: number} if number else {})
        found = store.begin("annotate", numbered, inputs, ANNOTATIONS)
        if not isinstance(found, Dataset):
            return last_finished if keep_failed and last_finished is not None else numbered
        if not found.summary.get(UNANSWERED):
            return numbered
        number, last_finished = number + 1, numbered


def attempt_figures(semantic: dict[str, Any]) -> dict[str, Any]:
    """The attempt's number as a figure of the dataset; empty for attempt 0."""
    return {name: semantic[name] for name in (_ATTEMPT,) if name in semantic}


def first_attempt(
    semantic: Mapping[str, Any], inputs: Mapping[str, Dataset], draft: Draft
) -> Draft:
    """The draft in whose folder all attempts keep their journal and batches."""
    first = {name: value for name, value in semantic.items() if name != _ATTEMPT}
    return replace(draft, id=dataset_id("annotate", first, inputs, ANNOTATIONS))
