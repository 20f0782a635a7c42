"""Configs of stages verify, annotate and convert."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from .. import own_code
from ..labels import Route, TeacherContext
from .base import Config, added, operational
from .endpoint import PaidEndpoint
from .own import NAMED, OWN, OwnAnnotator, OwnReward, named_or_own
from .rewards import JudgePart, Part, deciding, part_labels
from .rollout import PolicyConfig, Sampler, TransformersSampler


class AnswerReward(Config):
    """1 if the final answer equals the gold answer, else 0: math-verify, choices, or plain text."""

    engine: Literal["answer"] = Field(default="answer", description="What rewards.")


Reward = Annotated[
    Annotated[AnswerReward, Tag(NAMED)] | Annotated[OwnReward, Tag(OWN)], named_or_own("engine")
]


class VerifyConfig(Config):
    """Stage verify: final answers against gold answers, in killable worker processes."""

    rollouts: str = Field(
        default="rollouts", description="Rollouts dataset: alias, id or stage/id."
    )
    reward: Reward = added(
        AnswerReward(), "What rewards a response: its final answer, or a function of your own."
    )
    rewards: list[Part] = added(
        [],
        "Parts whose weighted mean is the reward, by name or as functions of your own; empty: "
        "`reward` judges.",
    )
    correct_by: str | int = added(
        0, "The part of `rewards` that decides whether a response is right: its name or index."
    )
    correct_at: float = added(1.0, "Least value of that part that counts as right.", gt=0, le=1)
    timeout_s: float = Field(default=10.0, gt=0, description="Deadline per verification.")
    memory_mib: int = Field(default=2048, ge=256, description="Address-space limit per worker.")
    truncated: Literal["zero", "mask"] = Field(
        default="zero", description="Truncated responses: reward 0, or no reward (masked)."
    )
    max_answer_chars: int = Field(
        default=50_000, ge=1, description="Longer answers are not parsed."
    )
    workers: int = operational(2, "Worker processes.", ge=1)
    recycle_every: int = operational(2000, "Jobs before a worker is replaced.", ge=1)

    @property
    def decides(self) -> int:
        """The index of the part that decides `correct`."""
        return deciding(self.rewards, self.correct_by)

    @property
    def judges(self) -> dict[str, JudgePart]:
        """The parts that ask an endpoint, by their labels."""
        labels = part_labels(self.rewards)
        pairs = zip(labels, self.rewards, strict=True)
        return {label: part for label, part in pairs if isinstance(part, JudgePart)}

    def semantic(self) -> dict[str, Any]:
        """With the source's hash of each part of one's own."""
        parts = {"rewards": [part.semantic() for part in self.rewards]} if self.rewards else {}
        return super().semantic() | parts

    @model_validator(mode="after")
    def _parts(self) -> "VerifyConfig":
        if not self.rewards:
            for name in ("correct_by", "correct_at"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} says which part of rewards decides, and rewards is empty; give "
                        f"rewards, or leave {name} out"
                    )
            return self
        if self.reward != AnswerReward():
            raise ValueError(
                "reward and rewards are both given; make reward one of the parts of rewards"
            )
        if not any(part.weight for part in self.rewards):
            raise ValueError("rewards: all weights are 0; give one part a weight above 0")
        deciding(self.rewards, self.correct_by)
        return self


class SegmentConfig(Config):
    """How a response is cut into numbered segments (never inside a formula)."""

    min_chars: int = Field(default=1, ge=1, description="Shorter segments join the next one.")
    max_segments: int = Field(
        default=200, ge=1, description="Adjacent segments merge above this number."
    )


class NoAnnotator(Config):
    """Marks nothing and costs nothing: for routing that needs no annotations."""

    engine: Literal["none"] = Field(description="Annotation engine.")


ERROR_TYPES = (
    "Error spans get a label of ErrorType, which names a mistake; false: of DiagnosticType, as key "
    "spans."
)
REFLECTION = (
    "Also ask for a corrective idea about each wrong response, without the final answer, for "
    "routing.teacher_context reflection."
)


class RuleAnnotator(Config):
    engine: Literal["rule"] = Field(description="Annotation engine.")
    name: str = Field(default="rule", description="Name recorded with each annotation.")
    match: Literal["line", "value"] = Field(
        default="line",
        description="line: a segment is correct if it equals the known step's text; value: if the "
        "equations that it states are correct.",
    )
    wrong_spans: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of marks moved to another segment of the response, to measure the "
        "cost of "
        "an annotator's mistakes.",
    )
    wrong_types: float = Field(
        default=0.0, ge=0, le=1, description="Share of type labels replaced by another one."
    )
    error_types: bool = added(False, ERROR_TYPES)
    reflection: bool = added(False, REFLECTION)


class AnnotatorPrompt(Config):
    prompt: str | None = Field(
        default=None, description="Prompt file (front matter with version); null: the shipped one."
    )
    answer_schema: str | None = Field(
        default=None, description="JSON schema of the answer; null: the shipped one."
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Limit on the answer's tokens.")
    temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature of the annotator."
    )
    corrective_turns: int = Field(
        default=1, ge=0, description="Second chances for an invalid answer."
    )
    error_types: bool = added(False, ERROR_TYPES)
    reflection: bool = added(False, REFLECTION)


class SelfAnnotator(AnnotatorPrompt):
    engine: Literal["self"] = Field(description="Annotation engine.")
    name: str = Field(default="self", description="Name recorded with each annotation.")
    policy: PolicyConfig | None = Field(
        default=None, description="Annotating policy. null: in training the current weights."
    )
    sampler: Sampler = Field(default=TransformersSampler(), description="Sampling engine.")
    seed: int = Field(default=0, description="Base seed of sampled answers.")
    structured: bool = Field(
        default=True,
        description="Constrained decoding: every answer is valid, without quotes and without "
        "thinking. false: the policy answers freely, like an endpoint.",
    )
    max_spans: int = Field(default=3, ge=1, description="Most spans of a structured answer.")
    weights: Literal["current", "base"] = Field(
        default="current",
        description="Weights of the annotator in training if `policy` is null: the current ones, "
        "or "
        "a static copy of the first ones.",
    )


class _OpenAIName(AnnotatorPrompt):
    engine: Literal["openai"] = Field(description="Annotation engine.")
    name: str = Field(default="openai", description="Name recorded with each annotation.")


class OpenAIAnnotator(PaidEndpoint, _OpenAIName):
    role: ClassVar[str] = "annotator"

    batch: bool = operational(False, "Use OpenAI's Batch API: cheaper, with answers within a day.")
    batch_requests: int = operational(
        50_000,
        "Most requests of one batch; fewer for an account with a low limit of queued tokens.",
        ge=1,
        le=50_000,
    )
    batch_poll_s: float = operational(60.0, "Seconds between polls of a batch.", gt=0)
    max_failed_share: float = operational(
        0.05,
        "Most of the requested rows that may fail; above it the command finishes the dataset and "
        "exits with code 1.",
        ge=0,
        le=1,
    )
    keep_failed: bool = operational(
        False,
        "Use a finished dataset even if rows in it failed. false: rows without an answer "
        "(time-outs, "
        "server errors, connections) are requested again, for another dataset.",
    )


NamedAnnotator = Annotated[
    NoAnnotator | RuleAnnotator | SelfAnnotator | OpenAIAnnotator, Field(discriminator="engine")
]
Annotator = Annotated[
    Annotated[NamedAnnotator, Tag(NAMED)] | Annotated[OwnAnnotator, Tag(OWN)],
    named_or_own("engine"),
]


class AnnotateConfig(Config):
    """Stage annotate: key spans of correct responses, error spans of wrong ones."""

    verdicts: str = Field(
        default="verdicts", description="Verdicts dataset: alias, id or stage/id."
    )
    annotator: Annotator = Field(description="Annotation engine.")
    segment: SegmentConfig = Field(default=SegmentConfig(), description="Segmenting.")


class RoutingConfig(Config):
    """Which tokens are routed, to which loss, and how rewards become advantages."""

    rule: str = Field(
        default="spans",
        description="Which tokens are routed: spans (the annotator's), first_span (its earliest), "
        "from_first_span (from there to the end), prefix (the first tokens), surprise (the least "
        "likely ones under the policy), all, random, inverted (random outside the annotator's "
        "spans); with scores entropy (the student's highest) and importance (TIP's); or "
        "file.py:function or module:function of your own.",
    )
    alpha: float = Field(
        default=0.25, ge=0, le=1, description="Largest share of a response that spans may cover."
    )
    key: Route = Field(
        default=Route.FKL, description="Action on routed tokens of correct responses."
    )
    error: Route = Field(
        default=Route.GRPO, description="Action on routed tokens of wrong responses."
    )
    teacher_context: TeacherContext = Field(
        default=TeacherContext.TYPE,
        description="What the teacher sees besides the problem: type, only the diagnostic label "
        "(TRACE); for the baselines the gold answer, the reference solution, a correct response of "
        "the same group (peer, shortest_peer), a wrong one (wrong_peer), the solution of another "
        "problem (other_solution), the annotator's corrective idea (reflection), or none. "
        "Responses without it are plain GRPO.",
    )
    contrast_context: TeacherContext | None = added(
        None,
        "What the same teacher sees for comparison: the action reweight then takes its "
        "log-probability under teacher_context minus that under this one. Responses without it are "
        "plain GRPO. null: the student's log-probability takes its place.",
    )
    contrasts: int = added(
        1, "Most wrong responses that contrast_context wrong_peer averages over.", ge=1
    )
    advantage: Literal["std", "mean"] = Field(
        default="std",
        description="std: (r − mean) / (std + ε) of the group; mean: r − mean (Dr. GRPO).",
    )
    advantage_eps: float = Field(default=1e-4, gt=0, description="ε in (r − mean) / (std + ε).")
    overlong: Literal["keep", "mask", "soft"] = Field(
        default="keep",
        description="Responses at the token limit: keep; mask (count in their group, not trained "
        "on); soft (DAPO: a penalty that grows over the last overlong_buffer tokens to 1).",
    )
    overlong_buffer: int = Field(
        default=256, ge=1, description="Tokens before the limit at which overlong=soft begins."
    )

    def semantic(self) -> dict[str, Any]:
        """A rule of one's own is known by its file's name; the stage adds the file's hash."""
        own = own_code.is_own(self.rule)
        return super().semantic() | ({"rule": own_code.short_name(self.rule)} if own else {})

    def located(self) -> "RoutingConfig":
        """With the absolute path of a rule of one's own, for workers in other folders."""
        own = own_code.is_own(self.rule)
        return self.model_copy(update={"rule": own_code.absolute_name(self.rule)} if own else {})

    @model_validator(mode="after")
    def _contrast(self) -> "RoutingConfig":
        contrast = self.contrast_context
        if self.contrasts > 1 and contrast is not TeacherContext.WRONG_PEER:
            raise ValueError(
                f"contrasts is {self.contrasts}, and only contrast_context=wrong_peer has several; "
                "set contrasts=1"
            )
        if contrast is None:
            return self
        if Route.REWEIGHT not in (self.key, self.error):
            raise ValueError(
                f"contrast_context is {contrast.value}, and only the action reweight compares with "
                "it; set key or error to reweight, or contrast_context=null"
            )
        if contrast is TeacherContext.TYPE:
            raise ValueError(
                "contrast_context is type, and a contrast has to be a text or none; take another"
            )
        if contrast is self.teacher_context:
            raise ValueError(
                f"contrast_context and teacher_context are both {contrast.value}, so their gap is "
                "nil; take another contrast_context"
            )
        return self


class ConvertConfig(Config):
    """Stage convert: annotations become routed training sequences."""

    annotations: str = Field(
        default="annotations", description="Annotations dataset: alias, id or stage/id."
    )
    scores: str | None = added(
        None,
        "Scores dataset of the same rollouts, for rules that see entropy and divergence: alias, id "
        "or stage/id; null: none.",
    )
    policy: PolicyConfig = Field(
        default=PolicyConfig(), description="The policy whose tokenizer made the token ids."
    )
    routing: RoutingConfig = Field(default=RoutingConfig(), description="Routing.")
