"""Closed enumerations: every label that a table, a config or a prompt may hold."""

from enum import IntEnum, StrEnum


class Route(IntEnum):
    """Which loss a response token goes to (METHOD.md, "One rollout's way", step 6)."""

    GRPO = 0
    FKL = 1
    RKL = 2
    JSD = 3
    REWEIGHT = 4


class Action(StrEnum):
    """What routed tokens get: the "corner" of METHOD.md, step 5.

    jsd is the generalised Jensen-Shannon divergence; reweight is GRPO whose advantage the teacher's
    likelihood ratio scales (RLSD).
    """

    NONE = "none"
    FKL = "fkl"
    RKL = "rkl"
    JSD = "jsd"
    REWEIGHT = "reweight"

    @property
    def route(self) -> Route:
        return Route.GRPO if self is Action.NONE else Route[self.name]


class SpanKind(StrEnum):
    """KEY: a critical segment of a correct response; ERROR: the error of a wrong one."""

    KEY = "key"
    ERROR = "error"


class DiagnosticType(StrEnum):
    """The coarse type of a key or error span: the only privileged thing that the teacher sees."""

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


class AnswerKind(StrEnum):
    """How a gold answer is compared: as mathematics, or as the letter of a choice."""

    MATH = "math"
    CHOICE = "choice"


class Operation(StrEnum):
    """What a built-in arithmetic problem asks for."""

    ADD = "add"
    SUBTRACT = "subtract"

    @property
    def sign(self) -> str:
        return "+" if self is Operation.ADD else "-"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class VerdictStatus(StrEnum):
    """What the verifier can say of a response; `scored` ones carry a reward."""

    OK = "ok"
    PRED_UNPARSED = "pred_unparsed"
    TRUNCATED = "truncated"
    GOLD_UNPARSED = "gold_unparsed"
    TIMEOUT = "timeout"
    OOM = "oom"
    ERROR = "error"


class AnnotationStatus(StrEnum):
    """OK: spans found; EMPTY: the annotator looked and marked nothing; ABSTAINED: it declined;
    INVALID: its answer did not parse or names segments that are not there; SKIPPED: the rollout
    has no reward, or no annotator was asked; FAILED: the call never succeeded (its error begins with
    "unanswered" where another attempt may succeed)."""

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
