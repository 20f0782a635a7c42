"""Config of the objective: the KL's schedule, the teacher's weights, gates, the loss itself."""

from typing import Literal

from pydantic import Field, model_validator

from ..labels import KlClip, Signal
from .base import Config, added, operational
from .rollout import PolicyConfig


class ScheduleConfig(Config):
    """λ of METHOD.md: w0 for `hold_steps`, linear to 0 over `decay_steps`."""

    w0: float = Field(default=0.5, ge=0, description="Initial KL weight; 0 is plain GRPO.")
    start_step: int = added(0, "Steps of plain GRPO, λ = 0, before hold_steps begins.", ge=0)
    hold_steps: int = Field(default=10, ge=0, description="Steps at w0.")
    decay_steps: int | None = Field(
        default=30, ge=0, description="Steps from w0 to 0; null: λ stays at w0."
    )
    grpo: Literal["fade", "keep"] = added(
        "fade",
        "Weight of GRPO on tokens with a divergence: fade, 1 − λ / w0, so that one replaces the "
        "other; keep: 1, so that they add up.",
    )


class TeacherConfig(Config):
    """The teacher's weights; `routing.teacher_context` sets its context."""

    sync: Literal["periodic", "ema", "frozen"] = Field(
        default="periodic",
        description="periodic: the student's, copied every sync_steps; ema: their moving average, "
        "updated after each step; frozen: the base policy's.",
    )
    sync_steps: int = Field(default=10, ge=1, description="Steps between periodic syncs.")
    ema_rate: float = Field(
        default=0.05, gt=0, le=1, description="Share of the student in each update of the average."
    )
    model: PolicyConfig | None = added(
        None,
        "Another model of the same vocabulary as the teacher; needs sync frozen. null: the policy.",
    )
    scores: str | None = added(
        None,
        "Scores dataset (alias, id or stage/id) that takes the teacher's place in offline steps; "
        "null: none.",
    )
    temperature: float | None = added(
        None,
        "Divides the teacher's logits; null: the sampling temperature, as the student's.",
        gt=0,
    )

    @model_validator(mode="after")
    def _own_weights(self) -> "TeacherConfig":
        if self.model is None:
            return self
        if self.sync != "frozen":
            raise ValueError(
                f"teacher.model has weights of its own, and sync is {self.sync}; set sync=frozen, "
                "or model=null"
            )
        if (self.model.device, self.model.precision) != ("auto", "auto"):
            raise ValueError(
                "teacher.model computes where and how the policy does; leave its device and "
                "precision at auto"
            )
        return self


class GateConfig(Config):
    """A factor of a routed token's weight, from one signal x of it.

    above, below: 1 on that side of `at`, `floor` on the other; rising, falling: floor + (1 − floor)
    σ(±(x − at) / scale); signed: tanh((at − x) / scale).
    """

    of: Signal = Field(description="The signal x.")
    shape: Literal["above", "below", "rising", "falling", "signed"] = Field(
        description="How the factor depends on x."
    )
    at: float | None = Field(default=None, description="Where the factor changes, in x's unit.")
    quantile: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Instead of at: this quantile of x over the routed tokens of the step before; "
        "until there is one the factor is 1.",
    )
    scale: float = Field(default=1.0, gt=0, description="Width of the change, in x's unit.")
    floor: float = Field(
        default=0.0, ge=-1, le=1, description="Factor on the other side; below 0 it changes sign."
    )

    @model_validator(mode="after")
    def _one_place(self) -> "GateConfig":
        if (self.at is None) == (self.quantile is None):
            raise ValueError("give either at or quantile")
        if self.shape in ("above", "below") and self.scale != 1:
            raise ValueError(f"scale has no effect on shape {self.shape}; leave it out")
        if self.shape == "signed" and self.floor:
            raise ValueError("floor has no effect on shape signed; leave it out")
        return self


class LossConfig(Config):
    """The objective on routed tokens and on all others."""

    grpo: bool = Field(default=True, description="GRPO's term; false: the KL only.")
    policy: Literal["grpo", "gspo", "cispo", "sapo"] = added(
        "grpo",
        "Form of GRPO's term: grpo, the clipped ratio of each token; gspo, of each sequence; "
        "cispo, the clipped ratio as a constant weight; sapo, a smooth gate instead of the clip.",
    )
    sapo_tau_positive: float = added(1.0, "Temperature of sapo's gate, advantage above 0.", gt=0)
    sapo_tau_negative: float = added(1.05, "Temperature of sapo's gate, else.", gt=0)
    key_weight: float = added(
        1.0, "Factor on the KL of correct responses; below 0 the divergence is ascended."
    )
    error_weight: float = added(1.0, "The same of wrong responses.")
    gates: list[GateConfig] = added(
        [], "Factors of a routed token's KL, or of its part in the action reweight; multiplied."
    )
    importance_clip: float | None = added(
        None,
        "Multiplies a routed token's KL by its ratio between trainer and sampler, at most this; "
        "null: off.",
        gt=0,
    )
    top_k: int | None = added(
        None,
        "Divergences over the student's k likeliest tokens and one for all others; null: over the "
        "whole vocabulary.",
        ge=1,
    )
    clip_low: float = Field(default=0.2, gt=0, description="ε_low of the ratio clip.")
    clip_high: float = Field(
        default=0.28, gt=0, description="ε_high of the ratio clip (clip-higher)."
    )
    aggregation: Literal["sequence", "token", "constant"] = Field(
        default="sequence",
        description="Weight of a response token: sequence 1/(B |y|) (GRPO), token 1/Σ|y| (DAPO), "
        "constant 1/(B · constant_length) (Dr. GRPO).",
    )
    constant_length: int = Field(
        default=1024, ge=1, description="Length that aggregation=constant divides by, tokens."
    )
    truncated_importance: float | None = Field(
        default=None,
        gt=0,
        description="Cap of the truncated importance weight between the sampler and the trainer; "
        "null: the clipped ratio to the sampler's own log-probabilities.",
    )
    reference_kl: float = Field(
        default=0.0,
        ge=0,
        description="Weight of a KL to the base policy; at 0 no copy of it is kept.",
    )
    kl_clip: KlClip = Field(default=KlClip.NONE, description="Form of the pointwise KL clip.")
    kl_clip_value: float = Field(
        default=0.05, gt=0, description="Bound of the pointwise KL clip, nats."
    )
    jsd_beta: float = Field(
        default=0.5, gt=0, lt=1, description="Teacher's share in the mixture of the action jsd."
    )
    entropy_beta: float = Field(
        default=0.0,
        ge=0,
        description="β of the weight exp(−β H) of a routed token's KL; H is the teacher's "
        "entropy, nats.",
    )
    reweight: Literal["ratio", "inverse", "bounded", "one_sided"] = added(
        "ratio",
        "Form of the action reweight, with the gap D between teacher and student (or contrast): "
        "ratio, exp(±D) clipped (RLSD); inverse, exp(∓D) clipped (RLRT); bounded, "
        "λ tanh(D / scale) is added and the sign kept (RLCSD); one_sided, D beyond a threshold "
        "strengthens alone (AMR-SD).",
    )
    reweight_clip: float = Field(
        default=0.2,
        gt=0,
        description="ε of reweight ratio and inverse: the factor is clipped to 1 ± ε; largest |D| "
        "of one_sided.",
    )
    reweight_scale: float = added(1.0, "Scale of D in reweight bounded, nats.", gt=0)
    reweight_threshold: float = added(
        0.0,
        "Reweight one_sided: D counts beyond it, nats; bounded: smaller changes are left out.",
        ge=0,
    )
    fp32_logits: bool = added(
        False,
        "Logits in float32 where the policy computes in bfloat16, in the trainer and in vLLM's "
        "head.",
    )
    backend: Literal["auto", "torch", "triton"] = operational(
        "auto",
        "Implementation of the loss; auto: triton on CUDA where it is installed, else torch.",
    )

    @model_validator(mode="after")
    def _used(self) -> "LossConfig":
        if self.policy != "grpo" and self.truncated_importance is not None:
            raise ValueError(
                f"truncated_importance is a bound of policy grpo, and policy {self.policy} has its "
                "own; set policy=grpo, or truncated_importance=null"
            )
        if self.policy != "grpo" and not self.grpo:
            raise ValueError(
                f"policy {self.policy} has no effect with grpo=false; leave one of them out"
            )
        if self.policy != "sapo" and (self.sapo_tau_positive, self.sapo_tau_negative) != (1, 1.05):
            raise ValueError(
                "sapo_tau_positive and sapo_tau_negative have no effect without policy sapo; "
                "leave them out"
            )
        return self

    @model_validator(mode="after")
    def _reweight_used(self) -> "LossConfig":
        if self.reweight in ("ratio", "inverse") and self.reweight_clip > 1:
            raise ValueError(
                f"reweight_clip is {self.reweight_clip}, so the factor 1 ± reweight_clip of "
                f"reweight {self.reweight} could turn the advantage's sign; give at most 1"
            )
        if self.reweight != "bounded" and self.reweight_scale != 1:
            raise ValueError("reweight_scale has no effect without reweight bounded; leave it out")
        if self.reweight in ("ratio", "inverse") and self.reweight_threshold:
            raise ValueError(
                f"reweight_threshold has no effect on reweight {self.reweight}; leave it out, or "
                "use bounded or one_sided"
            )
        return self

    @model_validator(mode="after")
    def _top_k_runs(self) -> "LossConfig":
        if self.top_k is not None and self.backend == "triton":
            raise ValueError("top_k has no form in backend triton; use auto or torch")
        return self
