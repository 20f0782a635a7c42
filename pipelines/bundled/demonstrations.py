"""Pre-training data of the micro policy: noisy responses, and annotations of them.

bundled/micro.py samples from it; templates and `NOISE` also serve the study and tests. A response
adds or subtracts step by step. A carry or borrow is dropped, a result is off by one, the answer is
copied wrongly, each at its own rate. Half of the prompts carry a hint, the teacher's with a
diagnostic type, and the noise of that type is then left out. A marking is an annotator's question
about such a response with the rule annotator's answer, so that a policy can annotate its own
rollouts (the study's online self).

A world (WorldConfig) sets the rates and adds lines that begin with `#`, which are no steps:

    # by columns          whether steps follow, or the answer at once (`# at once`)
    # qkvj                filler before a step
    1+7+0=8 c0
"""

import json
import random
from dataclasses import dataclass, replace

from ...data.sources.arithmetic import answer_text, column, digit_pairs, operands, problem_row
from ...schemas.configs import WorldConfig
from ...schemas.labels import DiagnosticType, Operation
from ...trace.segment import segment
from ..annotators.prompting import AnnotationPrompt, ask
from ..annotators.rows import Item
from ..annotators.rule import by_line

STUDENT_TEMPLATE = "{problem}"
TEACHER_TEMPLATE = "{problem}\nhint: {diagnostic_type}"
PRIVILEGED_TEMPLATE = "{problem}\nsee:\n{context}"
MICRO_WORLD = WorldConfig()


def noise(world: WorldConfig) -> dict[DiagnosticType, float]:
    """Rates at which a demonstration goes wrong, by the label of the line that goes wrong."""
    return {
        DiagnosticType.CASE_ANALYSIS: world.dropped_carry,
        DiagnosticType.ARITHMETIC: world.off_by_one,
        DiagnosticType.FINAL_ANSWER: world.miscopied,
    }


NOISE = noise(MICRO_WORLD)
_RATES = ("dropped_carry", "off_by_one", "miscopied")
# Labels without noise of their own: hints that change nothing.
UNINFORMATIVE = (DiagnosticType.COUNTING, DiagnosticType.SETUP)
# The lines that say which form a response has, and the letters of filler.
BY_COLUMNS, AT_ONCE = "# by columns", "# at once"
LETTERS = "cfhjkqvz"


def demonstration(
    rng: random.Random,
    hint: DiagnosticType | None,
    problem: tuple[int, int],
    operation: Operation = Operation.ADD,
    world: WorldConfig = MICRO_WORLD,
) -> str:
    """A response with noise; each line follows from the lines before it, errors included."""
    hinted = hint is not None
    if world.announces and rng.random() < (world.short_hinted if hinted else world.short_plain):
        return f"{AT_ONCE}\n{_at_once(rng, problem, operation, world)}"
    filler = world.filler if world.filler and _has_filler(rng, hinted, world) else 0
    rates = {
        kind: rate * (1 - world.edge) if kind is hint else rate
        for kind, rate in noise(world).items()
    }
    lines = [BY_COLUMNS] if world.announces else []
    digits, taken = [], 0
    for a, b in digit_pairs(*problem):
        if filler:
            lines.append("# " + "".join(rng.choice(LETTERS) for _ in range(filler)))
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


def _has_filler(rng: random.Random, hinted: bool, world: WorldConfig) -> bool:
    return not hinted or world.filler_kept == 1 or rng.random() < world.filler_kept


def _at_once(
    rng: random.Random, problem: tuple[int, int], operation: Operation, world: WorldConfig
) -> str:
    """The answer alone; a wrong one has a wrong digit."""
    left, right = problem
    digits = list(str(left + right if operation is Operation.ADD else left - right))
    if rng.random() >= world.short_right:
        at = rng.randrange(len(digits))
        digits[at] = str((int(digits[at]) + rng.choice((1, -1))) % 10)
    return answer_text("".join(digits))


def sample_chat(
    rng: random.Random, subtraction: float = 0.0, world: WorldConfig = MICRO_WORLD
) -> tuple[str, str]:
    """User turn and noisy response of one demonstration; half of them are hinted.

    subtraction: share of the problems that subtract.
    """
    operation, left, right = _problem(rng, subtraction, world)
    problem = f"{left}{operation.sign}{right}"
    if rng.random() < 0.5:
        response = demonstration(rng, None, (left, right), operation, world)
        return STUDENT_TEMPLATE.format(problem=problem), response
    if world.reference and rng.random() < world.reference:
        return _with_reference(rng, problem, (left, right), operation, world)
    # Mostly meaningful labels; the others too, so that no label is unknown.
    informative = rng.random() < 0.8
    hint = rng.choice(list(NOISE) if informative else list(DiagnosticType))
    user = TEACHER_TEMPLATE.format(problem=problem, diagnostic_type=hint)
    return user, demonstration(rng, hint, (left, right), operation, world)


def _with_reference(
    rng: random.Random,
    problem: str,
    numbers: tuple[int, int],
    operation: Operation,
    world: WorldConfig,
) -> tuple[str, str]:
    """User turn with another response to the problem, and a response.

    Half of the shown ones are written without noise. A right one removes errors of all kinds, as
    the world's edge says; a wrong one changes nothing.
    """
    scaled = dict.fromkeys(_RATES, 0.0)
    quiet = world.model_copy(update=scaled | {"short_plain": 0.0})
    shown = demonstration(rng, None, numbers, operation, quiet if rng.random() < 0.5 else world)
    result = sum(numbers) if operation is Operation.ADD else numbers[0] - numbers[1]
    if shown.endswith("\n" + answer_text(str(result))):
        scaled = {name: (1 - world.edge) * getattr(world, name) for name in _RATES}
        world = world.model_copy(update=scaled)
    user = PRIVILEGED_TEMPLATE.format(problem=problem, context=shown)
    return user, demonstration(rng, UNINFORMATIVE[0], numbers, operation, world)


@dataclass(frozen=True)
class Mixture:
    """Shares in pre-training: of subtraction problems, and of batches of markings.

    prompt: the annotation prompt of the markings; world: of the demonstrations.
    """

    subtraction: float = 0.0
    marking: float = 0.0
    prompt: AnnotationPrompt | None = None
    world: WorldConfig = MICRO_WORLD


def sample_marking(
    rng: random.Random,
    prompt: AnnotationPrompt,
    subtraction: float = 0.0,
    world: WorldConfig = MICRO_WORLD,
) -> tuple[str, str, str]:
    """System and user turn of an annotator's question about one response, and the answer."""
    operation, left, right = _problem(rng, subtraction, world)
    row = problem_row(left, right, operation)
    response = demonstration(rng, None, (left, right), operation, world)
    correct = response.endswith("\n" + answer_text(row["answer"]))
    item = Item("", "", "", row, response, segment(response), correct)
    reading = by_line(item)
    answer = {
        "spans": [{"segments": marked} for marked in reading.marked],
        "type": reading.type or DiagnosticType.OTHER,
    }
    system, user = ask(prompt, item)
    return system["content"], user["content"], json.dumps(answer)


def _problem(
    rng: random.Random, subtraction: float, world: WorldConfig
) -> tuple[Operation, int, int]:
    subtracts = subtraction > 0 and rng.random() < subtraction
    operation = Operation.SUBTRACT if subtracts else Operation.ADD
    return operation, *operands(rng, world.min_digits, world.max_digits, operation)
