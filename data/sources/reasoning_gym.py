"""Problems from reasoning-gym's procedural tasks.

The source of kind `reasoning-gym`, called through `sources.rows` by stage problems.
"""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.metadata import version
from itertools import count
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from ...schemas.configs import GymSource
from ...schemas.errors import InputError
from ...schemas.labels import AnswerKind
from ..manifest import content_hash

ENDLESS = True
INSTRUCTION = "Put your final answer within \\boxed{}."
# Some tasks generate all problems at once or refuse a large size, so create them in batches.
_BATCH = 256
_ANY = "any answer that the scorer of reasoning-gym's task {} accepts"


def rows(source: GymSource, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream; the same seed gives the same stream. Problems may repeat.

    A task whose answers only its own scorer can judge yields "" as answers; with `scored` a
    sentence, and all rows have metadata for the scorer.

    Raises:
        InputError: an unknown task (lists similar names), or settings that the task refuses.
    """
    _check(source)
    # The task seeds problem i with seed + i, so neighbouring seeds would share problems.
    first_seed = int(content_hash(["reasoning-gym", source.task, seed], 7), 16)
    for start in count(0, _BATCH):
        try:
            task = reasoning_gym.create_dataset(
                source.task, seed=first_seed + start, size=_BATCH, **source.settings
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise InputError(
                f"source.settings of reasoning-gym task {source.task!r}: {error}; "
                "see the task's config for its settings"
            ) from None
        for index, entry in enumerate(task):
            question = entry["question"].strip()
            row = {
                "problem": f"{question}\n\n{INSTRUCTION}" if source.instructions else question,
                "answer": (entry["answer"] or "").strip(),
                "answer_kind": AnswerKind.MATH,
                "solution": None,
                "steps": None,
                "source": f"reasoning-gym/{source.task}",
            }
            if source.scored:
                row["answer"] = row["answer"] or _ANY.format(source.task)
                row["answer_kind"] = AnswerKind.TEXT
                row["metadata"] = _metadata(source, entry, first_seed + start, index)
            yield row


def _metadata(source: GymSource, entry: dict[str, Any], seed: int, index: int) -> str:
    """What the scorer needs, as JSON. An entry that JSON changes (tuples, sets, dates) is left out:
    the scorer then makes it again from seed and index.
    """
    # No scorer reads it, and it has tuples in most tasks.
    about = {key: value for key, value in entry["metadata"].items() if key != "difficulty"}
    entry = entry | {"metadata": about}
    try:
        text = json.dumps(entry)
        kept = entry if _same(json.loads(text), entry) else None
    except (TypeError, ValueError):
        kept = None
    gym = {"task": source.task, "settings": source.settings, "entry": kept}
    return json.dumps({"gym": gym | {"seed": seed, "size": _BATCH, "index": index}})


def _same(read: Any, written: Any) -> bool:
    """Equal, and of the same types all the way down: 1 is no True, and 1.0 no 1."""
    if type(read) is not type(written):
        return False
    if isinstance(read, dict):
        return read.keys() == written.keys() and all(_same(read[k], written[k]) for k in read)
    if isinstance(read, list):
        return len(read) == len(written) and all(map(_same, read, written))
    return read == written


def identity(source: GymSource) -> dict[str, Any]:
    _check(source)
    return source.semantic() | {"reasoning-gym": version("reasoning-gym")}


def _check(source: GymSource) -> None:
    if source.task not in DATASETS:
        near = get_close_matches(source.task, DATASETS, n=5, cutoff=0.4) or sorted(DATASETS)[:5]
        raise InputError(
            f"source.task {source.task!r} is not a reasoning-gym task; near names: "
            f"{', '.join(near)}"
        )
    for name, field in (("seed", "seed"), ("size", "limit")):
        if name in source.settings:
            raise InputError(f"source.settings.{name}: is not a setting here; set {field} instead")
