"""Pre-training data of the micro policy: noisy responses, and annotations of them.

bundled/micro.py samples from it; templates and `NOISE` also serve the study and tests. A response
adds or subtracts step by step. A carry or borrow is dropped, a result is off by one, the answer is
copied wrongly, each at its own rate. Half of the prompts carry a hint, the teacher's with a
diagnostic type, and the noise of that type is then left out. A marking is an annotator's question
about such a response with the rule annotator's answer, so that a policy can annotate its own
rollouts (the study's online self).
"""

import json
import random
from dataclasses import dataclass, replace

from ...data.sources.arithmetic import answer_text, column, digit_pairs, operands, problem_row
from ...schemas.labels import DiagnosticType, Operation
from ...trace.segment import segment
from ..annotators.prompting import AnnotationPrompt, ask
from ..annotators.rows import Item
from ..annotators.rule import by_line

STUDENT_TEMPLATE = "{problem}"
TEACHER_TEMPLATE = "{problem}\nhint: {diagnostic_type}"
# Rates at which a demonstration goes wrong, by the label of the line that goes wrong.
NOISE = {
    DiagnosticType.CASE_ANALYSIS: 0.20,
    DiagnosticType.ARITHMETIC: 0.12,
    DiagnosticType.FINAL_ANSWER: 0.08,
}
# Labels without noise of their own: hints that change nothing.
UNINFORMATIVE = (DiagnosticType.COUNTING, DiagnosticType.SETUP)
MAX_DIGITS = 5


def demonstration(
    rng: random.Random,
    hint: DiagnosticType | None,
    problem: tuple[int, int],
    operation: Operation = Operation.ADD,
) -> str:
    """A response with noise; each line follows from the lines before it, errors included."""
    rates = {kind: 0.0 if kind is hint else rate for kind, rate in NOISE.items()}
    lines, digits, taken = [], [], 0
    for a, b in digit_pairs(*problem):
        line = column(a, b, taken, operation)
        if line.passed and rng.random() < rates[DiagnosticType.CASE_ANALYSIS]:
            line = replace(line, passed=0)
        elif not line.passed and rng.random() < rates[DiagnosticType.ARITHMETIC]:
            up = line.result == 0 or (line.result < 9 and rng.random() < 0.5)
            line = replace(line, result=line.result + (1 if up else -1))
        lines.append(line.text)
        digits.append(line.digit)
        taken = line.passed
    if taken and operation is Operation.ADD:
        digits.append(taken)
    if rng.random() < rates[DiagnosticType.FINAL_ANSWER]:
        at = rng.randrange(len(digits))
        digits[at] = (digits[at] + rng.choice((1, -1))) % 10
    answer = "".join(map(str, reversed(digits)))
    if operation is Operation.SUBTRACT:
        answer = answer.lstrip("0") or "0"
    return "\n".join([*lines, answer_text(answer)])


def sample_chat(
    rng: random.Random, min_digits: int = 2, subtraction: float = 0.0
) -> tuple[str, str]:
    """User turn and noisy response of one demonstration; half of them are hinted.

    subtraction: share of the problems that subtract.
    """
    operation, left, right = _problem(rng, min_digits, subtraction)
    problem = f"{left}{operation.sign}{right}"
    if rng.random() < 0.5:
        response = demonstration(rng, None, (left, right), operation)
        return STUDENT_TEMPLATE.format(problem=problem), response
    # Mostly meaningful labels; the others too, so that no label is unknown.
    informative = rng.random() < 0.8
    hint = rng.choice(list(NOISE) if informative else list(DiagnosticType))
    user = TEACHER_TEMPLATE.format(problem=problem, diagnostic_type=hint)
    return user, demonstration(rng, hint, (left, right), operation)


@dataclass(frozen=True)
class Mixture:
    """Shares in pre-training: of subtraction problems, and of batches of markings.

    prompt: the annotation prompt of the markings.
    """

    subtraction: float = 0.0
    marking: float = 0.0
    prompt: AnnotationPrompt | None = None


def sample_marking(
    rng: random.Random, prompt: AnnotationPrompt, subtraction: float = 0.0
) -> tuple[str, str, str]:
    """System and user turn of an annotator's question about one response, and the answer."""
    operation, left, right = _problem(rng, 2, subtraction)
    row = problem_row(left, right, operation)
    response = demonstration(rng, None, (left, right), operation)
    correct = response.endswith("\n" + answer_text(row["answer"]))
    item = Item("", "", "", row, response, segment(response), correct)
    reading = by_line(item)
    answer = {
        "spans": [{"segments": marked} for marked in reading.marked],
        "type": reading.type or DiagnosticType.OTHER,
    }
    system, user = ask(prompt, item)
    return system["content"], user["content"], json.dumps(answer)


def _problem(rng: random.Random, min_digits: int, subtraction: float) -> tuple[Operation, int, int]:
    subtracts = subtraction > 0 and rng.random() < subtraction
    operation = Operation.SUBTRACT if subtracts else Operation.ADD
    return operation, *operands(rng, min_digits, MAX_DIGITS, operation)
