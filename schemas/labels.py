"""Closed enumerations: every label in tables, configs and prompts. All rooms use them."""

import hashlib
import json
from enum import IntEnum, StrEnum
from typing import Any

from pydantic_core import core_schema


class Route(IntEnum):
    """Which loss a response token goes to (METHOD.md, "One rollout's way", steps 5 and 6).

    FKL, RKL and JSD are divergences to the teacher: forward KL, reverse KL, generalised
    Jensen-Shannon. REWEIGHT is GRPO whose advantage the teacher's likelihood ratio scales (RLSD).
    Add a divergence by a member here and its formula in `trace.losses.DIVERGENCES`; config values,
    table codes, metrics, charts and colours loop over the members.
    """

    GRPO = 0
    FKL = 1
    RKL = 2
    JSD = 3
    REWEIGHT = 4

    @property
    def label(self) -> str:
        """The name in metrics, pages and class names."""
        return self.name.lower()

    @property
    def action(self) -> str:
        """The name in a config, where "none" leaves tokens to GRPO."""
        return "none" if self is Route.GRPO else self.label

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> core_schema.CoreSchema:
        """A config field of this type holds the member; its JSON, which dataset ids hash,
        `action`.
        """
        members = {route.action: route for route in cls}
        names = core_schema.literal_schema(list(members))
        return core_schema.no_info_before_validator_function(
            lambda value: value.action if isinstance(value, cls) else value,
            core_schema.no_info_after_validator_function(members.__getitem__, names),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda r: r.action),
        )


class SpanKind(StrEnum):
    """KEY: a critical span of a correct response; ERROR: the error of a wrong one."""

    KEY = "key"
    ERROR = "error"


class Selection(StrEnum):
    """What becomes of a response after stage select: ANNOTATE, an annotator is asked about it;
    PLAIN, it is trained on as plain GRPO; DROP, its group leaves training.
    """

    ANNOTATE = "annotate"
    PLAIN = "plain"
    DROP = "drop"


class LeftOut(StrEnum):
    """The criterion by which stage select leaves a response out."""

    UNSCORED = "unscored"
    ALL_RIGHT = "all right"
    ALL_WRONG = "all wrong"
    PASS_RATE = "pass rate"  # noqa: S105
    TRUNCATED = "truncated"
    LENGTH = "length"
    DUPLICATE = "duplicate"
    SOURCE = "source"
    BUDGET = "budget"


class DiagnosticType(StrEnum):
    """The coarse type of a key span, and of an error span in tables without ErrorType.

    A member of this or of ErrorType is the only privileged input of TRACE's teacher.
    """

    CASE_ANALYSIS = "case_analysis"
    ALGEBRA_MANIPULATION = "algebra_manipulation"
    ARITHMETIC = "arithmetic"
    THEOREM_APPLICATION = "theorem_application"
    COUNTING = "counting"
    SIGN_OR_BOUND = "sign_or_bound"
    UNIT_OR_DOMAIN = "unit_or_domain"
    SUBSTITUTION = "substitution"
    LOGICAL_INFERENCE = "logical_inference"
    SETUP = "setup"
    FINAL_ANSWER = "final_answer"
    OTHER = "other"


class ErrorType(StrEnum):
    """The coarse type of an error span: each member names a mistake.

    The paper's example is an omitted case (arXiv 2605.10194); the other members are our choice. No
    value is one of DiagnosticType's, so a label says which enumeration it belongs to.
    """

    OMITTED_CASE = "omitted_case"
    ALGEBRA_SLIP = "algebra_slip"
    ARITHMETIC_SLIP = "arithmetic_slip"
    MISAPPLIED_THEOREM = "misapplied_theorem"
    MISCOUNT = "miscount"
    WRONG_SIGN_OR_BOUND = "wrong_sign_or_bound"
    WRONG_UNIT_OR_DOMAIN = "wrong_unit_or_domain"
    WRONG_SUBSTITUTION = "wrong_substitution"
    INVALID_INFERENCE = "invalid_inference"
    MISREAD_PROBLEM = "misread_problem"
    WRONG_SETUP = "wrong_setup"
    WRONG_FINAL_ANSWER = "wrong_final_answer"
    OTHER_MISTAKE = "other_mistake"


TypeLabel = DiagnosticType | ErrorType
TYPE_LABELS: tuple[TypeLabel, ...] = (*DiagnosticType, *ErrorType)

# The mistake in a step of that type, for annotators that know only the step.
MISTAKE_IN: dict[DiagnosticType, ErrorType] = {
    DiagnosticType.CASE_ANALYSIS: ErrorType.OMITTED_CASE,
    DiagnosticType.ALGEBRA_MANIPULATION: ErrorType.ALGEBRA_SLIP,
    DiagnosticType.ARITHMETIC: ErrorType.ARITHMETIC_SLIP,
    DiagnosticType.THEOREM_APPLICATION: ErrorType.MISAPPLIED_THEOREM,
    DiagnosticType.COUNTING: ErrorType.MISCOUNT,
    DiagnosticType.SIGN_OR_BOUND: ErrorType.WRONG_SIGN_OR_BOUND,
    DiagnosticType.UNIT_OR_DOMAIN: ErrorType.WRONG_UNIT_OR_DOMAIN,
    DiagnosticType.SUBSTITUTION: ErrorType.WRONG_SUBSTITUTION,
    DiagnosticType.LOGICAL_INFERENCE: ErrorType.INVALID_INFERENCE,
    DiagnosticType.SETUP: ErrorType.WRONG_SETUP,
    DiagnosticType.FINAL_ANSWER: ErrorType.WRONG_FINAL_ANSWER,
    DiagnosticType.OTHER: ErrorType.OTHER_MISTAKE,
}

# What a label says in words: {diagnosis} of a teacher's prompt, and the annotator's instructions.
WORDS: dict[TypeLabel, str] = {
    DiagnosticType.CASE_ANALYSIS: "telling all cases apart",
    DiagnosticType.ALGEBRA_MANIPULATION: "transforming an expression or equation",
    DiagnosticType.ARITHMETIC: "calculating with numbers",
    DiagnosticType.THEOREM_APPLICATION: "applying a theorem or formula",
    DiagnosticType.COUNTING: "counting each object once",
    DiagnosticType.SIGN_OR_BOUND: "keeping signs, inequalities and bounds right",
    DiagnosticType.UNIT_OR_DOMAIN: "minding units and the range of allowed values",
    DiagnosticType.SUBSTITUTION: "putting values or expressions in for variables",
    DiagnosticType.LOGICAL_INFERENCE: "drawing a conclusion that follows",
    DiagnosticType.SETUP: "turning the problem into equations or a model",
    DiagnosticType.FINAL_ANSWER: "stating the answer that was asked for",
    DiagnosticType.OTHER: "a decisive step of another sort",
    ErrorType.OMITTED_CASE: "a case that is left out",
    ErrorType.ALGEBRA_SLIP: "a wrong transformation of an expression or equation",
    ErrorType.ARITHMETIC_SLIP: "a wrong calculation with numbers",
    ErrorType.MISAPPLIED_THEOREM: "a theorem or formula that does not apply or is misquoted",
    ErrorType.MISCOUNT: "objects that are counted twice or not at all",
    ErrorType.WRONG_SIGN_OR_BOUND: "a wrong sign, or an inequality or bound the wrong way round",
    ErrorType.WRONG_UNIT_OR_DOMAIN: "a wrong unit, or a value outside the allowed range",
    ErrorType.WRONG_SUBSTITUTION: "a wrong value or expression put in for a variable",
    ErrorType.INVALID_INFERENCE: "a conclusion that does not follow",
    ErrorType.MISREAD_PROBLEM: "a condition or question of the problem that is misread or ignored",
    ErrorType.WRONG_SETUP: "equations or a model that do not describe the problem",
    ErrorType.WRONG_FINAL_ANSWER: "a final answer that is not what was derived or asked for",
    ErrorType.OTHER_MISTAKE: "a mistake of another sort",
}


def words_sha256() -> str:
    """SHA-256 of all labels and their words, for ids of what was made with them."""
    words = {str(label): words for label, words in WORDS.items()}
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def type_label(value: str | None) -> TypeLabel:
    """The member of DiagnosticType or ErrorType with this value.

    Raises:
        ValueError: there is none.
    """
    return ErrorType(value) if value in _ERRORS else DiagnosticType(value)


def types_of(kind: SpanKind, error_types: bool) -> tuple[TypeLabel, ...]:
    """The vocabulary of a span's kind; error_types: whether errors have one of their own."""
    own = error_types and kind is SpanKind.ERROR
    return tuple(ErrorType) if own else tuple(DiagnosticType)


_ERRORS = frozenset(str(label) for label in ErrorType)


class TeacherContext(StrEnum):
    """What a teacher sees besides the problem. TYPE is TRACE's; the others are baselines'.

    TYPE: the label of DiagnosticType or ErrorType; ANSWER: the gold answer; SOLUTION: the reference
    solution; PEER: the first other correct response of the group; SHORTEST_PEER: the shortest one;
    WRONG_PEER: the first other wrong one; OTHER_SOLUTION: the solution of another problem;
    REFLECTION: the annotator's corrective idea; NONE: nothing.
    """

    TYPE = "type"
    ANSWER = "answer"
    SOLUTION = "solution"
    PEER = "peer"
    SHORTEST_PEER = "shortest_peer"
    WRONG_PEER = "wrong_peer"
    OTHER_SOLUTION = "other_solution"
    REFLECTION = "reflection"
    NONE = "none"


class Signal(StrEnum):
    """What a gate weighs a routed token by.

    TEACHER_ENTROPY, STUDENT_ENTROPY: of the next token, nats; DIVERGENCE: the token's exact one,
    nats; POSITION: the token's place in its response, (t + 1/2) / tokens; IMPORTANCE: 1 − (1 − h)
    (1 − d) of the student's entropy and the divergence, each in 0 … 1 (TIP, arXiv 2604.14084).
    """

    TEACHER_ENTROPY = "teacher_entropy"
    STUDENT_ENTROPY = "student_entropy"
    DIVERGENCE = "divergence"
    POSITION = "position"
    IMPORTANCE = "importance"


class AnswerKind(StrEnum):
    """How a gold answer is compared: as mathematics, as a choice's letter, or as plain text."""

    MATH = "math"
    CHOICE = "choice"
    TEXT = "text"


class Operation(StrEnum):
    """Operation of a built-in arithmetic problem."""

    ADD = "add"
    SUBTRACT = "subtract"

    @property
    def sign(self) -> str:
        return "+" if self is Operation.ADD else "-"


class TurnRole(StrEnum):
    """Whose turn of a conversation it is."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class FinishReason(StrEnum):
    """Why sampling ended: STOP at an end token, LENGTH at the token limit."""

    STOP = "stop"
    LENGTH = "length"


class VerdictStatus(StrEnum):
    """How a verification ended.

    OK: compared; PRED_UNPARSED: no answer found in the response; TRUNCATED: at the token limit;
    GOLD_UNPARSED: the gold answer does not parse; TIMEOUT, OOM, ERROR: the verifier failed. Of a
    judge: REFUSED: it declined; INVALID: its answer has no grade that can be used; FAILED: the call
    never succeeded.
    """

    OK = "ok"
    PRED_UNPARSED = "pred_unparsed"
    TRUNCATED = "truncated"
    GOLD_UNPARSED = "gold_unparsed"
    TIMEOUT = "timeout"
    OOM = "oom"
    ERROR = "error"
    REFUSED = "refused"
    INVALID = "invalid"
    FAILED = "failed"


class Order(StrEnum):
    """The order of a reference and a response in a judge's question."""

    REFERENCE_FIRST = "reference_first"
    RESPONSE_FIRST = "response_first"


class AnnotationStatus(StrEnum):
    """How an annotation ended.

    OK: spans found; EMPTY: the annotator marked nothing; ABSTAINED: it declined; INVALID: its
    answer did not parse or names missing segments; SKIPPED: the rollout has no reward, or no
    annotator was asked; FAILED: the call never succeeded (its error begins with "unanswered" if
    another attempt may succeed).
    """

    OK = "ok"
    EMPTY = "empty"
    ABSTAINED = "abstained"
    INVALID = "invalid"
    SKIPPED = "skipped"
    FAILED = "failed"


class KlClip(StrEnum):
    """Form of the pointwise KL clip (METHOD.md, "Objective")."""

    ENTRY_ABOVE = "entry_above"
    ENTRY_SYMMETRIC = "entry_symmetric"
    TOKEN = "token"  # noqa: S105 - a form of the clip
    NONE = "none"
