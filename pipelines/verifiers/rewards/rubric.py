"""A judge's rubric: loaded from a file that a person can read and change, filled per response.

Part `judge` and its estimate call it. A rubric (paid/prompt_file.py) has the sections `# system`,
`# user`, `# reference`, `# response` and `# correction`. `{{texts}}` of `# user` stands for the
sections `# reference` and `# response` in the order of the question, or for the response alone.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....schemas.configs import JudgePart
from ....schemas.conversation import shown_row
from ....schemas.labels import Order
from ....schemas.text_files import read_text_file
from ...paid.answer_text import read_object
from ...paid.dialogue import NoReading, Unusable, dialogue
from ...paid.prompt_file import Form, fence, fill, parse_prompt
from ...paid.questions import Dialogue, Messages, Question

SHIPPED_RUBRIC = Path(__file__).parent / "rubrics" / "judge-v1.md"

_FORM = Form(
    {
        "system": {"highest"},  # the same for all responses, so endpoints cache it
        "user": {"problem", "texts", "highest", "fence"},
        "reference": {"reference", "fence"},
        "response": {"response", "fence"},
        "correction": {"error", "highest"},
    },
    {
        "user": {"problem", "texts"},
        "reference": {"reference"},
        "response": {"response"},
        "correction": {"error"},
    },
    "my-rubric-v1",
)
_SCHEMA_NAME = "grade"
_MOST_CHARS = 2000  # of a reason that is kept
_MOST_ERROR_CHARS = 300


@dataclass(frozen=True)
class Rubric:
    """A rubric file, checked. sections: template by section name; sha256: of the file."""

    version: str
    sections: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class Grade:
    """A judge's answer."""

    grade: int
    reason: str


def load_rubric(path: str | None = None) -> Rubric:
    """Read a rubric file; None means the shipped one.

    Raises:
        InputError: it is missing or has another content.
    """
    advice = "give the path of a rubric in judge.rubric, or leave it out for the shipped one"
    file = SHIPPED_RUBRIC if path is None else Path(path)
    text = read_text_file(file, advice)
    version, sections = parse_prompt(text, file, _FORM)
    return Rubric(version, sections, hashlib.sha256(text.encode()).hexdigest())


def answer_schema(highest: int) -> dict[str, Any]:
    """Of the judge's answer. An enumeration: not every endpoint takes bounds of a number."""
    return {
        "type": "object",
        "properties": {
            "reason": {"type": "string"},
            "grade": {"type": "integer", "enum": list(range(highest + 1))},
        },
        "required": ["reason", "grade"],
        "additionalProperties": False,
    }


def grading(
    rubric: Rubric,
    part: JudgePart,
    problem: dict[str, Any],
    response: str,
    order: Order,
    repeat: int,
) -> Dialogue[Grade | NoReading]:
    """The conversation about one grade. problem: a row of table problems."""
    schema = answer_schema(part.highest)
    question = Question(
        _ask(rubric, part, problem, response, order),
        part.max_new_tokens,
        part.temperature,
        schema,
        rubric.version,
        _SCHEMA_NAME,
        repeat,
    )
    return dialogue(
        question,
        lambda text: _read(text, schema),
        lambda answer, error: correction(rubric, part, answer, error),
        part.corrective_turns,
    )


def correction(rubric: Rubric, part: JudgePart, answer: str, error: str) -> Messages:
    """The next messages after an answer that can't be used."""
    fields = {"error": error, "highest": str(part.highest)}
    return [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": fill(rubric.sections["correction"], fields)},
    ]


def _ask(
    rubric: Rubric, part: JudgePart, problem: dict[str, Any], response: str, order: Order
) -> Messages:
    sections, highest = rubric.sections, str(part.highest)
    fields = {"fence": fence(response), "highest": highest}
    texts = [fill(sections["response"], fields | {"response": response})]
    if part.shows != "nothing":
        reference = f"Final answer: {problem['answer']}"
        if part.shows == "solution" and problem.get("solution"):
            reference += f"\nSolution:\n{problem['solution']}"
        shown = fill(sections["reference"], fields | {"reference": reference})
        texts.insert(0 if order is Order.REFERENCE_FIRST else 1, shown)
    fields |= {"problem": shown_row(problem), "texts": "\n\n".join(texts)}
    return [
        {"role": "system", "content": fill(sections["system"], {"highest": highest})},
        {"role": "user", "content": fill(sections["user"], fields)},
    ]


def _read(text: str, schema: dict[str, Any]) -> Grade:
    try:
        value = read_object(text, schema)
    except Unusable as error:
        raise Unusable(str(error)[:_MOST_ERROR_CHARS]) from None
    except RecursionError:
        raise Unusable("it is nested too deep") from None
    reason = " ".join(value["reason"].split())
    # JSON can spell half of a surrogate pair, which no table holds.
    reason = reason.encode("utf-8", "replace").decode()
    return Grade(int(value["grade"]), reason[:_MOST_CHARS])
