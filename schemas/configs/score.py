"""Config of stage score: a teacher's likeliest tokens at the routed tokens, as a table."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Config, operational
from .endpoint import EndpointUrls, KeyVariable
from .rollout import PolicyConfig, PromptConfig


class LocalTeacher(Config):
    """A model on this machine. It gives the whole distribution, so entropies are exact."""

    engine: Literal["local"] = Field(default="local", description="Where the teacher runs.")
    policy: PolicyConfig = Field(
        default=PolicyConfig(),
        description="The teacher: any model of the vocabulary that made the token ids.",
    )


class VllmTeacher(Config):
    """A model behind vLLM servers, asked for the log-probabilities of prompts."""

    engine: Literal["vllm"] = Field(description="Where the teacher runs.")
    base_url: EndpointUrls = Field(
        description="Endpoint, e.g. http://localhost:8000/v1, or a list of them that serve the "
        "same model. Each has to allow k: vllm serve --max-logprobs, which is 20 by default."
    )
    model: str = Field(description="Name under which the servers serve the teacher.")
    api_key_env: KeyVariable | None = Field(
        default=None, description="Environment variable that holds the key; null sends no key."
    )
    concurrency: int = operational(8, "Requests in flight.", ge=1)
    timeout_s: float = operational(600.0, "Seconds before a request is given up.", gt=0)

    @property
    def servers(self) -> list[str]:
        """Each endpoint's address."""
        return self.base_url if isinstance(self.base_url, list) else [self.base_url]


Teacher = Annotated[LocalTeacher | VllmTeacher, Field(discriminator="engine")]


class ScoreConfig(Config):
    """Stage score: what a teacher gives the routed tokens, for training without the teacher."""

    routed: str = Field(default="routed", description="Routed dataset: alias, id or stage/id.")
    policy: PolicyConfig = Field(
        default=PolicyConfig(),
        description="The policy whose tokenizer made the token ids; it writes the teacher's "
        "prompt, as in training.",
    )
    teacher: Teacher = Field(default=LocalTeacher(), description="The teacher.")
    prompt: PromptConfig = Field(
        default=PromptConfig(), description="Prompt templates, the teacher's as in training."
    )
    k: int = Field(
        default=64,
        ge=1,
        description="Likeliest tokens that are kept at each routed token; above the vocabulary's "
        "size all of it. The others are kept as one sum.",
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Divides the teacher's logits; null: the temperature at which the response was "
        "sampled, as in training. Servers report temperature 1 alone.",
    )
    student: PolicyConfig | None = Field(
        default=None,
        description="A policy whose entropy and whose divergence from the teacher are added, for "
        "rules that see them; needs teacher.engine local. null: neither.",
    )
    micro_batch_tokens: int = operational(
        16_384, "Tokens per forward pass of a local teacher; a shared prompt counts once.", ge=1
    )

    @model_validator(mode="after")
    def _possible(self) -> "ScoreConfig":
        if self.teacher.engine == "vllm":
            if self.student is not None:
                raise ValueError(
                    "student needs the teacher's whole distribution, and a server sends its "
                    "likeliest tokens alone; use teacher.engine=local, or student=null"
                )
            if self.temperature not in (None, 1.0):
                raise ValueError(
                    f"temperature is {self.temperature:g}, and vLLM's prompt log-probabilities are "
                    "those of temperature 1, from which no other can be computed; use "
                    "temperature=1 or teacher.engine=local"
                )
        return self
