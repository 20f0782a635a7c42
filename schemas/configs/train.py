"""Config of stage train: optimiser, phases, collapse. The objective is in loss.py."""

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from ..labels import Route, Signal
from .annotate import Annotator, RoutingConfig, SegmentConfig, SelfAnnotator, VerifyConfig
from .base import Config, added, operational
from .loss import LossConfig, ScheduleConfig, TeacherConfig
from .pool import PoolConfig
from .rollout import PolicyConfig, PromptConfig, Sampler, SamplingConfig, TransformersSampler


class OptimConfig(Config):
    """AdamW and its learning rate."""

    kind: Literal["adamw", "adamw_8bit"] = added(
        "adamw",
        "adamw_8bit: moments of 8 bits (torchao), 2.1 bytes per trained parameter instead of 8.",
    )
    offload: bool = operational(
        False,
        "Keep trained weights, gradients and moments in the host's memory, and update them there.",
    )
    lr: float = Field(default=1e-6, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps of linear warm-up to the peak learning rate."
    )
    schedule: Literal["constant", "linear", "cosine"] = added(
        "constant", "Learning rate after the warm-up: constant, or falling until the last step."
    )
    min_lr_ratio: float = added(
        0.0, "Share of the peak that linear and cosine fall to.", ge=0, le=1
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW β1.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="AdamW β2.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient-norm clip.")
    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        description="Most consecutive steps skipped because their gradient is not finite; one more "
        "stops the run.",
    )

    @model_validator(mode="after")
    def _used(self) -> "OptimConfig":
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("min_lr_ratio needs schedule linear or cosine")
        if self.offload and self.kind == "adamw_8bit":
            raise ValueError(
                "offload keeps the moments in the host's memory, where 8 bits save no GPU memory; "
                "use kind adamw, or offload=false"
            )
        return self


class LoraConfig(Config):
    """Low-rank adapters instead of all weights (peft)."""

    rank: int = Field(default=32, ge=1, description="Rank of the adapters.")
    alpha: float = Field(default=64.0, gt=0, description="Adapters are scaled by alpha / rank.")
    target_modules: str | list[str] = Field(
        default="all-linear", description="Modules that get adapters, as in peft."
    )


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
    steps: int = Field(
        default=0, ge=0, description="Optimiser steps on fresh rollouts.", examples=[40]
    )
    pool: PoolConfig | None = added(
        None, "Draw problems by difficulty; null: in shuffled passes over all of them."
    )
    group_size: int = Field(default=8, ge=2, description="Responses per problem, G.")
    refill_rounds: int = Field(
        default=0,
        ge=0,
        description="Dynamic sampling: how often groups without signal are replaced by groups of "
        "other problems.",
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        le=1,
        description="1: the next step's rollouts are sampled while a step trains, by the weights "
        "before that step; needs train.sampler vllm or openai.",
    )
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="Sampling parameters.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Verification.")
    annotator: Annotator = Field(
        default=SelfAnnotator(engine="self"), description="Annotator; not called once λ is 0."
    )
    segment: SegmentConfig = Field(default=SegmentConfig(), description="Segmenting.")
    routing: RoutingConfig = Field(default=RoutingConfig(), description="Routing.")


class ValidationConfig(Config):
    """Held-out problems that the policy answers before the first step, every few steps, and after
    the last one. They do not affect training."""

    problems: dict[str, str] = Field(
        default={},
        description="Problems dataset (alias, id or stage/id) of each split; a study fills them "
        "in.",
    )
    every: int = Field(default=10, ge=1, description="Steps between validations.")
    k: int = Field(default=4, ge=1, description="Samples per problem, by online.sampling.")
    greedy: bool = Field(default=True, description="Add one greedy answer per problem.")
    seed: int = Field(default=0, description="Seed of the samples, the same at each validation.")


class CollapseConfig(Config):
    """When a run counts as collapsed: limits of what falls apart first.

    Steps are compared with the first ones by the median over `window_steps`. Entropy has no lower
    limit, because GRPO lowers it while it learns.
    """

    baseline_steps: int = Field(
        default=5, description="First steps, which the later ones are compared with.", ge=1
    )
    window_steps: int = Field(
        default=3, description="Latest steps that are compared with them.", ge=1
    )
    length_ratio: float = Field(
        default=0.6, description="Response tokens below this share of the first steps'.", gt=0, lt=1
    )
    entropy_ratio: float = Field(
        default=2.0, description="Entropy above this multiple of the first steps'.", gt=1
    )
    looping: float = Field(
        default=0.1,
        description="Share of responses that end in a loop, this much above the first steps'.",
        gt=0,
        lt=1,
    )
    pass_rate_ratio: float = Field(
        default=0.5,
        description="Pass rate below this share of the first steps', beyond 3 standard errors.",
        gt=0,
        lt=1,
    )
    validation_drop: float = Field(
        default=0.1,
        description="Pass rate of a validation this much below the best one, and beyond 3 standard "
        "errors.",
        gt=0,
        lt=1,
    )


Layers = Literal["eager", "compile", "liger"]


class TrainConfig(Config):
    """Stage train: offline steps over routed tables, then online steps on fresh rollouts."""

    policy: PolicyConfig = Field(default=PolicyConfig(), description="The base policy.")
    lora: LoraConfig | None = Field(
        default=None, description="Train adapters; null: all the weights."
    )
    prompt: PromptConfig = Field(default=PromptConfig(), description="Prompt templates.")
    offline: OfflineConfig = Field(default=OfflineConfig(), description="Offline phase.")
    online: OnlineConfig = Field(default=OnlineConfig(), description="Online phase.")
    validation: ValidationConfig | None = Field(
        default=None, description="Held-out problems evaluated during training; null: none."
    )
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="λ over all steps.")
    teacher: TeacherConfig = Field(default=TeacherConfig(), description="The teacher's weights.")
    loss: LossConfig = Field(default=LossConfig(), description="Objective.")
    optim: OptimConfig = Field(default=OptimConfig(), description="Optimiser.")
    groups_per_step: int = Field(default=16, ge=1, description="Problems per optimiser step.")
    drop_groups_without_signal: bool = Field(
        default=False,
        description="Leave out groups of equal rewards; they are counted either way.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of data order and sampling.")
    micro_batch_tokens: int = operational(
        16_384,
        "Tokens per forward pass; responses that share a prompt count it once.",
        ge=1,
    )
    gradient_checkpointing: bool | NonNegativeInt | Literal["auto"] = operational(
        False,
        "Recompute activations in the backward pass instead of storing them: true in all layers, a "
        "number in as many, false in none, auto in as few as the plan needs to fit this GPU.",
    )
    layers: Layers = operational(
        "eager",
        "How the decoder computes norms, rotary embeddings and SwiGLU: eager, as transformers "
        "does; compile, by torch.compile layer by layer; liger, by Liger's kernels on CUDA (extra "
        "liger).",
    )
    sampler: Sampler = Field(
        default=TransformersSampler(),
        description="Engine of online rollouts: transformers uses the trainer's own weights; "
        "vllm and "
        "openai (vLLM servers) receive a copy before each step.",
    )
    stop_on_collapse: bool = operational(
        False,
        "End with a checkpoint and exit code 3 when the run has collapsed; false: warn and go on.",
    )
    collapse: CollapseConfig = operational(CollapseConfig(), "When a run counts as collapsed.")
    checkpoint_every: int = operational(50, "Steps between checkpoints.", ge=1)
    checkpoint_minutes: float | None = operational(
        30.0,
        "Most minutes between checkpoints: one is written after the step that ends them, besides "
        "those of checkpoint_every; null: by steps alone.",
        gt=0,
    )
    checkpoints_kept: int = operational(
        2, "Number of newest checkpoints kept on disk while the run trains.", ge=1
    )
    keep_checkpoints: bool = operational(
        False,
        "Keep them when the run is finished, e.g. to export a step. false: only the final model, "
        "and with adapters the newest checkpoint.",
    )
    wait_hours: float = operational(
        72.0,
        "Under torchrun: how long a rank waits for another one that samples, annotates, loads or "
        "writes.",
        gt=0,
        le=10_000,
    )
    tracker: Literal["tensorboard", "trackio", "wandb", "mlflow", "none"] = operational(
        "tensorboard", "Where metrics go besides metrics.jsonl."
    )
    completions_every: int | None = operational(
        None,
        "Steps between tables of completions in the tracker: problem, response with its routed "
        "spans marked, reward, type; null: none.",
        ge=1,
    )
    profile_step: int | None = operational(
        None,
        "Step, from 0, that torch.profiler records; its Chrome trace goes into the run's folder. "
        "null: none.",
        ge=0,
    )

    @model_validator(mode="after")
    def _routes_have_what_the_loss_reads(self) -> "TrainConfig":
        routing, read = self.online.routing, {gate.of for gate in self.loss.gates}
        if (
            self.online.steps
            and Route.REWEIGHT in (routing.key, routing.error)
            and read & {Signal.DIVERGENCE, Signal.IMPORTANCE}
        ):
            raise ValueError(
                "loss.gates reads a divergence, which tokens of the action reweight do not have; "
                "use another signal, or another action in online.routing"
            )
        if self.teacher.scores is not None and self.loss.top_k is not None:
            raise ValueError(
                "loss.top_k does not go with teacher.scores, which have their own k; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _some_steps(self) -> "TrainConfig":
        if self.offline.steps + self.online.steps == 0:
            raise ValueError("offline.steps and online.steps are both 0; give one of them steps")
        last = self.offline.steps + self.online.steps - 1
        if self.profile_step is not None and self.profile_step > last:
            raise ValueError(
                f"profile_step is {self.profile_step}, but the last step is {last}; name one of "
                f"0 … {last}"
            )
        if self.lora is not None and self.optim.offload:
            raise ValueError(
                "optim.offload moves the frozen weights too, for the moments of a few adapters; "
                "set optim.offload=false"
            )
        if self.validation is not None and (self.online.max_staleness or not self.online.steps):
            raise ValueError(
                "validation uses the sampler of the online steps, between them; it needs "
                "online.steps above 0 and online.max_staleness=0"
            )
        if self.loss.fp32_logits and (self.sampler.engine != "vllm" or self.offline.steps):
            raise ValueError(
                "loss.fp32_logits needs log-probabilities from an engine whose head computes in "
                "float32 too; set sampler.engine=vllm and offline.steps=0, or fp32_logits=false"
            )
        if self.online.max_staleness and self.sampler.engine not in ("vllm", "openai"):
            raise ValueError(
                f"online.max_staleness is 1 but sampler.engine={self.sampler.engine} samples with "
                "the trainer's own weights; use engine vllm or openai, or max_staleness=0"
            )
        return self
