"""One pydantic model per stage: every knob with its description and a default right for most.

Fields marked `operational` change how a stage runs, never what it makes: they are left out of
dataset ids.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .labels import Action, AnswerKind, KlClip


class Config(BaseModel):
    """Base of all configs: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def semantic(self) -> dict[str, Any]:
        """The config as JSON-able data without operational fields: what a dataset id hashes."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("operational"):
                continue
            value = getattr(self, name)
            if isinstance(value, Config):
                out[name] = value.semantic()
            else:
                out[name] = self.model_dump(mode="json", include={name})[name]
        return out


def operational(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes how a stage runs, never what it makes."""
    return Field(
        default=default, description=description, json_schema_extra={"operational": True}, **limits
    )


# --- problems ------------------------------------------------------------------------------------


class Columns(Config):
    """Which columns of a foreign table hold what."""

    problem: str = Field(default="problem", description="Column of the problem text.")
    answer: str = Field(default="answer", description="Column of the gold answer.")
    solution: str | None = Field(
        default=None, description="Column of the reference solution, if any."
    )
    choices: list[str] | None = Field(
        default=None, description="Columns of wrong choices; the answer is shuffled among them."
    )


class FilesSource(Config):
    kind: Literal["files"] = Field(description="Kind of source.")
    path: str = Field(description="Parquet or JSONL file, or a glob of them.")
    columns: Columns = Field(default=Columns(), description="Column map.")
    answer_kind: AnswerKind = Field(
        default=AnswerKind.MATH, description="How answers are compared."
    )


class HubSource(Config):
    kind: Literal["hub"] = Field(description="Kind of source.")
    preset: str | None = Field(
        default=None,
        description="One of openthoughts-math, math-500, aime-2024, aime-2025, amc-2023, "
        "gpqa-diamond, gsm8k; sets the other fields.",
    )
    dataset: str | None = Field(
        default=None, description="Hugging Face dataset id, or a local folder."
    )
    subset: str | None = Field(default=None, description="Configuration name of the dataset.")
    split: str = Field(default="train", description="Split to read.")
    revision: str | None = Field(
        default=None, description="Commit or tag; pin it for reproducible ids."
    )
    columns: Columns = Field(default=Columns(), description="Column map.")
    answer_kind: AnswerKind = Field(
        default=AnswerKind.MATH, description="How answers are compared."
    )

    @model_validator(mode="after")
    def _one_of(self) -> "HubSource":
        if (self.preset is None) == (self.dataset is None):
            raise ValueError("give exactly one of preset and dataset")
        return self


class GymSource(Config):
    kind: Literal["reasoning-gym"] = Field(description="Kind of source.")
    task: str = Field(description="Name of a reasoning-gym task, e.g. chain_sum.")
    settings: dict[str, Any] = Field(default={}, description="The task's own settings.")
    instructions: bool = Field(
        default=True, description="Append a line that asks for a boxed answer."
    )


class ChampSource(Config):
    kind: Literal["champ"] = Field(description="Kind of source.")


class ArithmeticSource(Config):
    kind: Literal["arithmetic"] = Field(description="Kind of source.")
    min_digits: int = Field(default=3, ge=1, le=9, description="Fewest digits per addend.")
    max_digits: int = Field(default=5, ge=1, le=9, description="Most digits per addend.")

    @model_validator(mode="after")
    def _ordered(self) -> "ArithmeticSource":
        if self.min_digits > self.max_digits:
            raise ValueError("min_digits is above max_digits")
        return self


class WordProblemsSource(Config):
    kind: Literal["word-problems"] = Field(description="Kind of source.")
    steps: int = Field(default=2, ge=2, le=3, description="Number of calculation steps.")


Source = Annotated[
    FilesSource | HubSource | GymSource | ChampSource | ArithmeticSource | WordProblemsSource,
    Field(discriminator="kind"),
]


class ProblemsConfig(Config):
    """Stage problems: a source becomes a problems table."""

    source: Source = Field(description="Where problems come from.")
    limit: int | None = Field(default=None, ge=1, description="At most this many problems.")
    seed: int = Field(default=0, description="Seed of generated problems and of the shuffle.")
    shuffle: bool = Field(default=False, description="Shuffle before the limit is applied.")
    split: str = Field(default="train", description="Split recorded for each problem.")
    rows_per_part: int = Field(default=64, ge=1, description="Problems per Parquet part.")
    drop_unparsable: bool = Field(
        default=False,
        description="Drop problems whose gold answer does not parse instead of stopping.",
    )


# --- prompts and sampling ------------------------------------------------------------------------


class Example(Config):
    problem: str = Field(description="Example problem.")
    response: str = Field(description="Example response.")


class PromptConfig(Config):
    """How a problem becomes the student's and the teacher's chat prompt."""

    system: str | None = Field(default=None, description="System message.")
    examples: list[Example] = Field(default=[], description="Few-shot turns before the problem.")
    student: str = Field(default="{problem}", description="Template of the student's user turn.")
    teacher: str = Field(
        default="{problem}\n\nHint: the difficulty of this problem is of the type {diagnostic_type}.",
        description="Template of the teacher's user turn; sees the type label and nothing else.",
    )
    thinking: bool | None = Field(
        default=None,
        description="enable_thinking of the chat template; the same for both. None: unset.",
    )

    @model_validator(mode="after")
    def _fields(self) -> "PromptConfig":
        for name, template, allowed in (
            ("student", self.student, {"problem"}),
            ("teacher", self.teacher, {"problem", "diagnostic_type"}),
        ):
            fields = template_fields(template)
            if "problem" not in fields:
                raise ValueError(f"{name} template has no {{problem}}")
            if fields - allowed:
                raise ValueError(f"{name} template has unknown field {sorted(fields - allowed)[0]}")
        return self


def template_fields(template: str) -> set[str]:
    """Names of the replacement fields in a `str.format` template."""
    from string import Formatter

    return {field for _, field, _, _ in Formatter().parse(template) if field is not None}


class SamplingConfig(Config):
    temperature: float = Field(default=1.0, ge=0, description="Softmax temperature; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus threshold; 1 is off.")
    top_k: int = Field(default=0, ge=0, description="Keep the k likeliest tokens; 0 is off.")
    max_new_tokens: int = Field(default=1024, ge=1, description="Limit on response tokens.")


class TransformersSampler(Config):
    engine: Literal["transformers"] = Field(default="transformers", description="Sampling engine.")
    batch_tokens: int = operational(
        32_768, "Prompt plus response tokens (at their limit) in flight at once.", ge=1
    )


class OpenAISampler(Config):
    engine: Literal["openai"] = Field(description="Sampling engine.")
    base_url: str = Field(description="Endpoint, e.g. http://localhost:8000/v1.")
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds the key; None sends no key."
    )
    concurrency: int = operational(32, "Requests in flight.", ge=1)
    timeout_s: float = operational(600.0, "Seconds before a request is given up.", gt=0)


class VllmSampler(Config):
    engine: Literal["vllm"] = Field(description="Sampling engine.")
    max_model_len: int | None = Field(
        default=None, description="Context length; None: the model's."
    )
    gpu_memory_utilization: float = operational(0.85, "Share of GPU memory.", gt=0, le=1)
    kv_cache_gib: float | None = operational(None, "KV-cache size on CPU, GiB.", gt=0)
    tensor_parallel_size: int = operational(1, "GPUs per replica.", ge=1)
    seed: int = Field(default=0, description="Engine seed; samples carry their own.")


Sampler = Annotated[
    TransformersSampler | OpenAISampler | VllmSampler, Field(discriminator="engine")
]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


class PolicyConfig(Config):
    """Which model, where it runs and in which precision."""

    path: str = Field(
        default="micro", description="Folder, hub id, or a bundled name: micro, smollm2."
    )
    device: Device = operational("auto", "auto: CUDA if there is one, else CPU.")
    precision: Precision = operational("auto", "auto: bfloat16 on CUDA, float32 on CPU.")


class RolloutConfig(Config):
    """Stage rollout: a group of responses per problem."""

    problems: str = Field(
        default="problems", description="Problems dataset: alias, id or stage/id."
    )
    policy: PolicyConfig = Field(default=PolicyConfig(), description="The sampling policy.")
    sampler: Sampler = Field(default=TransformersSampler(), description="Sampling engine.")
    prompt: PromptConfig = Field(default=PromptConfig(), description="Prompt templates.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="Sampling parameters.")
    group_size: int = Field(default=8, ge=1, description="Responses per problem, G.")
    seed: int = Field(default=0, description="Base seed; each sample's seed derives from it.")


# --- verify --------------------------------------------------------------------------------------


class VerifyConfig(Config):
    """Stage verify: final answers against gold answers, in killable worker processes."""

    rollouts: str = Field(
        default="rollouts", description="Rollouts dataset: alias, id or stage/id."
    )
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


# --- annotate ------------------------------------------------------------------------------------


class SegmentConfig(Config):
    """How a response is cut into numbered segments (never inside a formula)."""

    min_chars: int = Field(default=1, ge=1, description="Shorter segments join the next one.")
    max_segments: int = Field(
        default=200, ge=1, description="Adjacent segments merge above this number."
    )


class RuleAnnotator(Config):
    engine: Literal["rule"] = Field(description="Annotation engine.")
    name: str = Field(default="rule", description="Name recorded with each annotation.")
    match: Literal["line", "value"] = Field(
        default="line",
        description="line: a segment is right if it equals the known step's text; value: by the "
        "equations that it states.",
    )


class AnnotatorPrompt(Config):
    prompt: str | None = Field(
        default=None, description="Prompt file (front matter with version); None: the shipped one."
    )
    answer_schema: str | None = Field(
        default=None, description="JSON schema of the answer; None: the shipped one."
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Limit on the answer's tokens.")
    temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature of the annotator."
    )
    corrective_turns: int = Field(
        default=1, ge=0, description="Second chances for an invalid answer."
    )


class SelfAnnotator(AnnotatorPrompt):
    engine: Literal["self"] = Field(description="Annotation engine.")
    name: str = Field(default="self", description="Name recorded with each annotation.")
    policy: PolicyConfig | None = Field(
        default=None, description="Annotating policy. None: in training the current weights."
    )
    sampler: Sampler = Field(default=TransformersSampler(), description="Sampling engine.")
    seed: int = Field(default=0, description="Base seed of sampled answers.")


class OpenAIAnnotator(AnnotatorPrompt):
    engine: Literal["openai"] = Field(description="Annotation engine.")
    name: str = Field(default="openai", description="Name recorded with each annotation.")
    base_url: str = Field(default="https://api.openai.com/v1", description="Endpoint.")
    model: str = Field(description="Model name at the endpoint.")
    api_key_env: str | None = Field(
        default="OPENAI_API_KEY",
        description="Environment variable that holds the key; None: no key.",
    )
    structured: bool = Field(default=True, description="Ask for the JSON schema (response_format).")
    usd_per_million_prompt_tokens: float | None = Field(
        default=None, ge=0, description="Price; None: unknown, and cost_usd stays null."
    )
    usd_per_million_completion_tokens: float | None = Field(
        default=None, ge=0, description="Price."
    )
    concurrency: int = operational(16, "Most requests in flight.", ge=1)
    requests_per_minute: float | None = operational(None, "Request pace; None: no limit.", gt=0)
    timeout_s: float = operational(120.0, "Seconds before a request is given up.", gt=0)
    max_attempts: int = operational(6, "Attempts per request, the first included.", ge=1)


Annotator = Annotated[
    RuleAnnotator | SelfAnnotator | OpenAIAnnotator, Field(discriminator="engine")
]


class AnnotateConfig(Config):
    """Stage annotate: key spans of correct responses, error spans of wrong ones."""

    verdicts: str = Field(
        default="verdicts", description="Verdicts dataset: alias, id or stage/id."
    )
    annotator: Annotator = Field(description="Annotation engine.")
    segment: SegmentConfig = Field(default=SegmentConfig(), description="Segmenting.")


# --- convert -------------------------------------------------------------------------------------


class RoutingConfig(Config):
    """Spans to token routes, rewards to advantages."""

    alpha: float = Field(
        default=0.25, ge=0, le=1, description="Most of a response that spans may cover."
    )
    key: Action = Field(default=Action.FKL, description="Action on key spans of correct responses.")
    error: Action = Field(
        default=Action.NONE, description="Action on error spans of wrong responses."
    )
    advantage_eps: float = Field(default=1e-4, gt=0, description="ε in (r − mean) / (std + ε).")


class ConvertConfig(Config):
    """Stage convert: annotations become routed training sequences."""

    annotations: str = Field(
        default="annotations", description="Annotations dataset: alias, id or stage/id."
    )
    policy: PolicyConfig = Field(
        default=PolicyConfig(), description="The policy whose tokenizer made the token ids."
    )
    routing: RoutingConfig = Field(default=RoutingConfig(), description="Routing.")


# --- train ---------------------------------------------------------------------------------------


class ScheduleConfig(Config):
    """λ of METHOD.md: w0 for `hold_steps`, linear to 0 over `decay_steps`."""

    w0: float = Field(default=0.5, ge=0, description="Initial KL weight; 0 is plain GRPO.")
    hold_steps: int = Field(default=10, ge=0, description="Steps at w0.")
    decay_steps: int = Field(default=30, ge=0, description="Steps from w0 to 0.")


class LossConfig(Config):
    clip_low: float = Field(default=0.2, gt=0, description="ε_low of the ratio clip.")
    clip_high: float = Field(
        default=0.28, gt=0, description="ε_high of the ratio clip (clip-higher)."
    )
    reference_kl: float = Field(
        default=0.0, ge=0, description="Weight of a KL to the base policy; 0 keeps no copy of it."
    )
    kl_clip: KlClip = Field(default=KlClip.NONE, description="Form of the pointwise KL clip.")
    kl_clip_value: float = Field(
        default=0.05, gt=0, description="Bound of the pointwise KL clip, nats."
    )


class OptimConfig(Config):
    lr: float = Field(default=1e-6, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(default=0, ge=0, description="Linear warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW β1.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="AdamW β2.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient-norm clip.")


class OfflineConfig(Config):
    routed: str = Field(default="routed", description="Routed dataset: alias, id or stage/id.")
    steps: int = Field(default=0, ge=0, description="Optimiser steps over routed tables.")
    max_staleness: int = Field(
        default=64,
        ge=0,
        description="Most optimiser steps between the sampling policy and the student.",
    )


class OnlineConfig(Config):
    problems: str = Field(
        default="problems", description="Problems dataset: alias, id or stage/id."
    )
    steps: int = Field(default=0, ge=0, description="Optimiser steps on fresh rollouts.")
    group_size: int = Field(default=8, ge=2, description="Responses per problem, G.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="Sampling parameters.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Verification.")
    annotator: Annotator = Field(
        default=SelfAnnotator(engine="self"), description="Annotator; not called once λ is 0."
    )
    segment: SegmentConfig = Field(default=SegmentConfig(), description="Segmenting.")
    routing: RoutingConfig = Field(default=RoutingConfig(), description="Routing.")


class TrainConfig(Config):
    """Stage train: offline steps over routed tables, then online steps on fresh rollouts."""

    policy: PolicyConfig = Field(default=PolicyConfig(), description="The base policy.")
    prompt: PromptConfig = Field(default=PromptConfig(), description="Prompt templates.")
    offline: OfflineConfig = Field(default=OfflineConfig(), description="Offline phase.")
    online: OnlineConfig = Field(default=OnlineConfig(), description="Online phase.")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="λ over all steps.")
    loss: LossConfig = Field(default=LossConfig(), description="Objective.")
    optim: OptimConfig = Field(default=OptimConfig(), description="Optimiser.")
    groups_per_step: int = Field(default=16, ge=1, description="Problems per optimiser step.")
    teacher_sync_steps: int = Field(default=10, ge=1, description="Steps between teacher syncs.")
    seed: int = Field(default=0, description="Seed of data order and sampling.")
    micro_batch_tokens: int = operational(16_384, "Padded tokens per forward pass.", ge=1)
    sampler: TransformersSampler = Field(
        default=TransformersSampler(), description="Engine of online rollouts (the live weights)."
    )
    checkpoint_every: int = operational(50, "Steps between checkpoints.", ge=1)

    @model_validator(mode="after")
    def _some_steps(self) -> "TrainConfig":
        if self.offline.steps + self.online.steps == 0:
            raise ValueError("offline.steps and online.steps are both 0; give one of them steps")
        return self


# --- evaluate and report -------------------------------------------------------------------------


class EvaluateConfig(Config):
    """Stage evaluate: avg@k, pass@k, maj@k of the base and of a trained checkpoint."""

    problems: str = Field(
        default="problems", description="Problems dataset: alias, id or stage/id."
    )
    policy: PolicyConfig = Field(default=PolicyConfig(), description="The base policy.")
    trained: str | None = Field(
        default=None,
        description="Train dataset whose final checkpoint is compared; None: base alone.",
    )
    sampler: Sampler = Field(default=TransformersSampler(), description="Sampling engine.")
    prompt: PromptConfig = Field(default=PromptConfig(), description="Prompt templates.")
    sampling: SamplingConfig = Field(
        default=SamplingConfig(temperature=0.6, top_p=0.95, top_k=20),
        description="Sampling parameters.",
    )
    k: int = Field(default=8, ge=1, description="Samples per problem.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Verification.")
    bootstrap: int = Field(default=10_000, ge=100, description="Bootstrap resamples of problems.")
    seed: int = Field(default=0, description="Seed of sampling and bootstrap.")


class ReportConfig(Config):
    """Stage report: one self-contained HTML file for a dataset."""

    dataset: str = Field(
        default="routed", description="Routed or annotations dataset, or a train run."
    )
    output: str | None = Field(
        default=None, description="HTML file; None: report.html beside the data."
    )
    limit: int = Field(default=2000, ge=1, description="At most this many rollouts on the page.")


class PipelineConfig(Config):
    """All stages in order; each stage's input is the stage before it."""

    name: str = Field(default="default", description="Prefix of the aliases that the run sets.")
    problems: ProblemsConfig = Field(description="Training problems.")
    eval_problems: ProblemsConfig = Field(description="Held-out problems for evaluation.")
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="Rollout stage.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Verify stage.")
    annotate: AnnotateConfig = Field(description="Annotate stage.")
    convert: ConvertConfig = Field(default=ConvertConfig(), description="Convert stage.")
    train: TrainConfig = Field(description="Train stage.")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="Evaluate stage.")
    report: ReportConfig = Field(default=ReportConfig(), description="Report stage.")
