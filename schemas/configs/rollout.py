"""Configs of prompts, policies, samplers, and stage rollout."""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from ..labels import words_sha256
from .base import Config, added, operational
from .endpoint import EndpointUrls, KeyVariable
from .own import NAMED, OWN, OwnSampler, named_or_own


class Example(Config):
    problem: str = Field(description="Example problem.")
    response: str = Field(description="Example response.")


class PromptConfig(Config):
    """How a problem becomes the student's and the teacher's chat prompt."""

    system: str | None = Field(
        default=None, description="System message; a conversation's own takes its place."
    )
    examples: list[Example] = Field(default=[], description="Few-shot turns before the problem.")
    student: str = Field(default="{problem}", description="Template of the student's user turn.")
    teacher: str = Field(
        default="{problem}\n\nHint: the difficulty of this problem is of the type "
        "{diagnostic_type}.",
        description="Template of the teacher's user turn, with the type label: {diagnostic_type} "
        "inserts it, {diagnosis} what it says in words (schemas/labels.py, WORDS).",
    )
    privileged: str = Field(
        default="{problem}\n\nFor reference, a correct solution:\n{context}\n\nNow solve it "
        "yourself.",
        description="Template of the teacher's user turn if teacher_context is not type.",
    )
    thinking: bool | None = Field(
        default=None,
        description="enable_thinking of the chat template. null: unset.",
    )
    teacher_thinking: bool | Literal["same"] | None = added(
        "same", "enable_thinking of the teacher's chat template; same: as thinking."
    )

    @model_validator(mode="after")
    def _fields(self) -> "PromptConfig":
        for name, template, allowed in (
            ("student", self.student, {"problem"}),
            ("teacher", self.teacher, {"problem", "diagnostic_type", "diagnosis"}),
            ("privileged", self.privileged, {"problem", "context"}),
        ):
            try:
                fields = template_fields(template)
            except ValueError as error:
                raise ValueError(f"{name} template: {error}; write {{{{ for a brace") from None
            if "problem" not in fields:
                raise ValueError(f"{name} template has no {{problem}}")
            if fields - allowed:
                raise ValueError(f"{name} template has unknown field {sorted(fields - allowed)[0]}")
        return self

    def semantic(self) -> dict[str, Any]:
        """With a hash of the labels' words if the teacher reads them."""
        words = {"words": words_sha256()} if "diagnosis" in template_fields(self.teacher) else {}
        return super().semantic() | words


def template_fields(template: str) -> set[str]:
    """Names of the replacement fields in a `str.format` template.

    Raises:
        ValueError: no such template, or a field with a format or a conversion.
    """
    from string import Formatter

    fields = set()
    for _, field, form, conversion in Formatter().parse(template):
        if form or conversion:
            raise ValueError(f"field {field} has a format; write {{{field}}} alone")
        if field is not None:
            fields.add(field)
    return fields


class SamplingConfig(Config):
    temperature: float = Field(default=1.0, ge=0, description="Softmax temperature; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus threshold; 1 is off.")
    top_k: int = Field(default=0, ge=0, description="Keep the k likeliest tokens; 0 is off.")
    max_new_tokens: int = Field(default=1024, ge=1, description="Limit on response tokens.")

    @property
    def truncates(self) -> bool:
        """Whether top-p or top-k leaves tokens out of the distribution."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def untruncated(self) -> bool:
        """Whether tokens are drawn from all of the softmax: neither greedy nor by top-p or
        top-k.
        """
        return self.temperature > 0 and not self.truncates


class TransformersSampler(Config):
    engine: Literal["transformers"] = Field(default="transformers", description="Sampling engine.")
    batch_tokens: int = operational(
        32_768, "Prompt plus response tokens (at their limit) in flight at once.", ge=1
    )


AdapterHandOver = Literal["load", "merge"]
ADAPTERS = operational(
    "load",
    "Training with lora: load passes the adapters alone to the engine; merge passes all weights, "
    "with the adapters added.",
)


class OpenAISampler(Config):
    engine: Literal["openai"] = Field(description="Sampling engine.")
    base_url: EndpointUrls = Field(
        description="Endpoint, e.g. http://localhost:8000/v1, or a list of them that serve the "
        "same "
        "model: requests go to the least busy, and to another when one fails."
    )
    api_key_env: KeyVariable | None = Field(
        default=None, description="Environment variable that holds the key; null sends no key."
    )
    concurrency: int = operational(32, "Requests in flight.", ge=1)
    timeout_s: float = operational(600.0, "Seconds before a request is given up.", gt=0)
    weights_folder: str | None = operational(
        None,
        "In training: folder for new weights, visible to trainer and vLLM servers under the same "
        "path; null: a folder in the run's own.",
    )

    adapters: AdapterHandOver = ADAPTERS

    @property
    def servers(self) -> list[str]:
        """Each endpoint's address."""
        return self.base_url if isinstance(self.base_url, list) else [self.base_url]


class VllmSampler(Config):
    engine: Literal["vllm"] = Field(description="Sampling engine.")
    max_model_len: int | None = Field(
        default=None, description="Context length; null: the model's."
    )
    gpu_memory_utilization: float | None = operational(
        None,
        "Share of GPU memory; null: of what is free when the engine opens, nine tenths, or half if "
        "it samples one step ahead of training.",
        gt=0,
        le=1,
    )
    kv_cache_gib: float | None = operational(None, "KV-cache size on CPU, GiB.", gt=0)
    tensor_parallel_size: int = operational(1, "GPUs per replica.", ge=1)
    adapters: AdapterHandOver = ADAPTERS
    seed: int = Field(default=0, description="Engine seed; samples carry their own.")


NamedSampler = Annotated[
    TransformersSampler | OpenAISampler | VllmSampler, Field(discriminator="engine")
]
Sampler = Annotated[
    Annotated[NamedSampler, Tag(NAMED)] | Annotated[OwnSampler, Tag(OWN)], named_or_own("engine")
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
    trust_remote_code: bool = operational(
        False, "Run the Python code that comes with the model, with all of this user's rights."
    )


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
