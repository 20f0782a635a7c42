"""ProcessBench: responses to mathematical problems with the first wrong step, found by experts.

Layout as on the hub (Qwen/ProcessBench; Zheng et al., arXiv 2412.06559), one file per split gsm8k,
math, olympiadbench, omnimath: a JSON array or JSON lines of

    {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "Sue lives …",
     "steps": ["To find out …", …], "final_answer_correct": false, "label": 1}

label: index of the first wrong step, −1 if all are right. There is no gold answer. A response whose
final answer is right may have a wrong step. `trace-opd import processbench` reads these files.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ..row_files import BadRow, bad_row
from . import LabelledResponse, label_rows, take

# A step is a paragraph (the paper's section on solution reformatting).
_SEPARATOR = "\n\n"


def labelled_responses(
    path: str, skip: Callable[[BadRow], None] | None = None
) -> Iterator[LabelledResponse]:
    """The file's rows in order; every row has a label. skip: as in `label_rows`.

    Raises:
        InputError: names the file, the row and the field at fault.
    """
    return label_rows(path, _labelled, skip)


def _labelled(row: dict[str, Any], where: str) -> LabelledResponse:
    steps = take(row, "steps", list, where)
    if not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise bad_row(where, "steps is not a list of texts", "leave the row out")
    label = take(row, "label", int, where)
    if not -1 <= label < len(steps):
        raise bad_row(
            where,
            "label is no step",
            "mend it, or leave the row out",
            f"label is {label}, and there are steps 0 to {len(steps) - 1}",
        )
    split = take(row, "id", str, where).rpartition("-")[0]
    return LabelledResponse(
        source=f"processbench/{split}" if split else "processbench",
        problem=take(row, "problem", str, where),
        answer=None,
        solution=None,
        generator=take(row, "generator", str, where),
        steps=tuple(steps),
        separator=_SEPARATOR,
        first_wrong=None if label == -1 else label,
        correct=take(row, "final_answer_correct", bool, where),
    )
