"""Attempts at one annotation: what an endpoint left unanswered is asked again.

Other datasets refer to a finished one by its id, so it is never rewritten. The same command makes
another dataset in its place, whose semantic config carries the attempt's number: attempt 0 has none.
All attempts share the journal, the batches and the budget of attempt 0.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from ...data.dataset import dataset_id
from ...data.store import Dataset, Draft, Store
from ...schemas.tables import ANNOTATIONS
from .base import Plan

UNANSWERED = "unanswered"  # figure of a finished dataset: rows that may succeed in another attempt
_ATTEMPT = "attempt"


def current_attempt(
    store: Store, semantic: dict[str, Any], inputs: Mapping[str, Dataset], keep_failed: bool
) -> dict[str, Any]:
    """The semantic config of the attempt that a command is about: one that is finished and left
    nothing unanswered, else the next one.

    keep_failed: of finished attempts the last one, whatever it left.
    """
    finished: dict[str, Any] | None = None
    for number in count():
        numbered = semantic | ({_ATTEMPT: number} if number else {})
        found = store.begin("annotate", numbered, inputs, ANNOTATIONS)
        if not isinstance(found, Dataset):
            return finished if keep_failed and finished is not None else numbered
        if not found.summary.get(UNANSWERED):
            return numbered
        finished = numbered
    raise AssertionError("count never ends")


def attempt_figures(semantic: dict[str, Any]) -> dict[str, Any]:
    """The attempt's number, as a figure of the dataset; nothing for attempt 0."""
    return {name: semantic[name] for name in (_ATTEMPT,) if name in semantic}


def first_attempt(plan: Plan, draft: Draft) -> Draft:
    """Where all attempts keep their files that are no tables."""
    semantic = {name: value for name, value in plan.semantic.items() if name != _ATTEMPT}
    return replace(draft, id=dataset_id("annotate", semantic, plan.inputs, ANNOTATIONS))
