"""PRM800K: responses to MATH problems with a human rating of each step (−1 wrong, 0, +1).

Layout as in github.com/openai/prm800k, README (Lightman et al., arXiv 2305.20050), JSON lines
phase1_train, phase1_test, phase2_train, phase2_test:

    {"question": {"problem", "ground_truth_answer", "ground_truth_solution",
                  "pre_generated_steps": [text, …], "pre_generated_answer"},
     "label": {"steps": [{"completions": [{"text", "rating", "flagged"}, …],
                          "human_completion", "chosen_completion"}, …],
               "finish_reason": "found_error"}}

Phase 2 rates the steps of a complete response until the first wrong one: the response is
`pre_generated_steps`. Phase 1 has no such field: its response is the path that the labeller chose.
`trace-opd import prm800k` reads these files.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..row_files import BadRow, bad_row
from . import LabelledResponse, label_rows, take

_SEPARATOR = "\n"
_FINISHED = ("solution", "found_error")
# The data names neither of the models that wrote the responses.
_GENERATOR = "prm800k"


def labelled_responses(
    path: str, left_out: Counter[str], skip: Callable[[BadRow], None] | None = None
) -> Iterator[LabelledResponse]:
    """The rows whose first wrong step is known, in order; the others are counted in `left_out`.

    Left out: rows that the labeller gave up or called a bad problem (counted by finish_reason),
    rows with an unrated or flagged step before the first wrong one ("unrated"), and rows whose
    error is not in the response ("other path"). skip: as in `label_rows`.

    Raises:
        InputError: names the file, the row and the field at fault.
    """
    return label_rows(path, lambda row, where: _labelled(row, where, left_out), skip)


def _labelled(row: dict[str, Any], where: str, left_out: Counter[str]) -> LabelledResponse | None:
    reason = take(row, "label", dict, where).get("finish_reason")
    if reason not in _FINISHED:
        left_out[str(reason)] += 1
        return None
    problem = take(row, "question.problem", str, where)
    answer = take(row, "question.ground_truth_answer", str, where)
    labels = take(row, "label.steps", list, where)
    generated = row["question"].get("pre_generated_steps")
    if generated is None:
        path_taken = [_chosen(step, where) for step in labels]
    else:
        path_taken = list(zip(_texts(generated, where), labels, strict=False))
        path_taken = [_rated(text, step, where) for text, step in path_taken]
    wrong = next((i for i, (_, rating) in enumerate(path_taken) if rating == -1), None)
    judged = path_taken if wrong is None else path_taken[:wrong]
    if any(rating is None for _, rating in judged):
        left_out["unrated"] += 1
        return None
    if reason == "found_error" and wrong is None:
        left_out["other path"] += 1
        return None
    texts = generated if generated is not None else [text for text, _ in path_taken]
    stated = row["question"].get("pre_generated_answer")
    return LabelledResponse(
        source="prm800k",
        problem=problem,
        answer=answer,
        solution=row["question"].get("ground_truth_solution"),
        generator=_GENERATOR,
        steps=tuple(texts),
        separator=_SEPARATOR,
        first_wrong=wrong,
        correct=True if reason == "solution" else None if stated is not None else False,
        stated=stated,
    )


def _texts(generated: Any, where: str) -> list[str]:
    if not isinstance(generated, list) or not all(isinstance(text, str) for text in generated):
        what = "question.pre_generated_steps is not a list of texts"
        raise bad_row(where, what, "leave the row out")
    return generated


def _rated(text: str, step: Any, where: str) -> tuple[str, int | None]:
    """The rating of the response's own step among the rated alternatives."""
    own = [c for c in _completions(step, where) if take(c, "text", str, where) == text]
    return text, _rating(own[0], where) if own else None


def _chosen(step: Any, where: str) -> tuple[str, int | None]:
    """The step that the labeller continued with; a step that they wrote themselves is right."""
    completions = _completions(step, where)
    if (chosen := step.get("chosen_completion")) is not None:
        if not isinstance(chosen, int) or not 0 <= chosen < len(completions):
            name = "label.steps.chosen_completion"
            raise bad_row(
                where,
                f"{name} is no completion",
                "leave the row out",
                f"{name} is {chosen!r:.40}, and there are {len(completions)} completions",
            )
        return take(completions[chosen], "text", str, where), _rating(completions[chosen], where)
    human = step.get("human_completion")
    text = human.get("text") if isinstance(human, dict) else human
    return (text, 1) if isinstance(text, str) else ("", None)


def _completions(step: Any, where: str) -> list[Any]:
    return take(step, "completions", list, f"{where}, label.steps")


def _rating(completion: dict[str, Any], where: str) -> int | None:
    rating = completion.get("rating")
    if rating not in (-1, 0, 1, None):
        name = "label.steps.completions.rating"
        what = "not −1, 0, 1 or null"
        raise bad_row(
            where, f"{name} is {what}", "leave the row out", f"{name} is {rating!r:.40}, {what}"
        )
    return None if completion.get("flagged") else rating
