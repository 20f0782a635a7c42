"""What a plan is made for: a config, the shape of its model, and the hardware."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ...schemas.configs import PolicyConfig, TrainConfig
from ...trace.other_teacher import adapters_base
from ..models import resolve_policy
from ..samplers import sampling_engine
from ..samplers.engine import Engine
from .model_shape import ModelShape, model_shape

# config.json of models by their hub id, so that these are planned without the hub.
_SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Setting:
    """A config, its model's shape, and the hardware.

    prompt_tokens, response_tokens: mean lengths that the plan assumes. teacher: the shape of
    teacher.model; None: the teacher is the policy's own.
    """

    config: TrainConfig
    shape: ModelShape
    gpus: int
    device: Literal["cpu", "cuda"]
    bfloat16: bool
    prompt_tokens: int
    response_tokens: int
    teacher: ModelShape | None = None

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step on one GPU; a prompt counts once per group."""
        group = self.prompt_tokens + self.config.online.group_size * self.response_tokens
        return -(-self.config.groups_per_step * group // self.gpus)

    @property
    def row_tokens(self) -> int:
        """Of the longest row of a forward pass: a response is never cut."""
        longest = self.most_tokens if self.config.online.steps else self.sequence_tokens
        return max(min(self.config.micro_batch_tokens, self.step_tokens), longest)

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def most_tokens(self) -> int:
        """Of a prompt and a response at its limit."""
        return self.prompt_tokens + self.config.online.sampling.max_new_tokens

    @property
    def engine(self) -> Engine:
        return sampling_engine(self.config.sampler, self.config.policy)

    @property
    def rows_at_once(self) -> float:
        """Responses that a GPU's sampler works on together."""
        responses = self.config.groups_per_step * self.config.online.group_size
        budget = self.engine.batch_tokens
        limit = responses if budget is None else max(1, budget // self.most_tokens)
        return min(responses / self.gpus, limit)

    @property
    def recomputed_layers(self) -> int:
        """Layers whose activations the backward pass computes again."""
        chosen = self.config.gradient_checkpointing
        assert chosen != "auto", "fitting.settled chooses"
        if isinstance(chosen, bool):
            return self.shape.layers if chosen else 0
        return min(chosen, self.shape.layers)

    @property
    def taught(self) -> bool:
        """Whether a run loads a teacher: scores take its place."""
        return self.config.schedule.w0 > 0 and self.config.teacher.scores is None

    @property
    def sharded(self) -> bool:
        """See `Ranks.shards`."""
        return self.gpus > 1 or self.bfloat16

    @property
    def computed(self) -> int:
        """Bytes of a weight in forward and backward passes."""
        return 2 if self.bfloat16 else 4


def setting(
    config: TrainConfig,
    gpus: int | None = None,
    prompt_tokens: int = 256,
    response_tokens: int | None = None,
) -> Setting:
    """gpus: number of GPUs to plan for; None: this machine, one GPU or the CPU.

    response_tokens: mean length; None: the limit, online.sampling.max_new_tokens.

    Raises:
        InputError: the policy's config cannot be read, or the teacher's.
    """
    policy, other = config.policy, config.teacher.model
    here = "cuda" if torch.cuda.is_available() or gpus is not None else "cpu"
    device = here if policy.device == "auto" else policy.device
    return Setting(
        config=config,
        shape=model_shape(_config_folder(policy.path), config.lora, policy.trust_remote_code),
        gpus=gpus or 1,
        device=device,  # type: ignore[arg-type] - one of the two
        bfloat16=policy.precision == "bfloat16"
        or (policy.precision == "auto" and device == "cuda"),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens or config.online.sampling.max_new_tokens,
        teacher=other and _teacher_shape(other),
    )


def _teacher_shape(model: PolicyConfig) -> ModelShape:
    base = adapters_base(model.path) or model.path
    return model_shape(_config_folder(base), None, model.trust_remote_code)


def _config_folder(path: str) -> str:
    shipped = _SHAPES / path
    if shipped.joinpath("config.json").is_file() and not Path(path).is_dir():
        return str(shipped)
    return resolve_policy(path, weights=False)
