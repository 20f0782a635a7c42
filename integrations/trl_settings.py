"""Settings of the TRL trainer: our config, what it takes from TRL's, and what it refuses.

trl.py calls these functions before a model is loaded. Imports no trl.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import Field, ValidationError

from ..schemas.configs import (
    Annotator,
    LossConfig,
    PromptConfig,
    RoutingConfig,
    ScheduleConfig,
    SegmentConfig,
    TeacherConfig,
    VerifyConfig,
)
from ..schemas.configs.base import Config, operational
from ..schemas.errors import InputError
from ..schemas.own_code import is_own
from ..trace.gates import needs_limits
from ..trace.route import needs_annotations, require_reflections, require_scores

TRL = "1.16.0"

# Settings of GRPOConfig that must stay at a value, and what to do instead.
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("use_vllm", False, "sampling is transformers', or a rollout_func's"),
    ("use_transformers_continuous_batching", False, "it is not tested with routed tokens"),
    ("use_liger_kernel", False, "the routed loss is fused already"),
    ("torch_compile", False, "packed rows change their shape with each batch"),
    ("cast_lm_head_to_fp32", False, "set routed.loss.fp32_logits"),
    ("top_entropy_quantile", 1.0, "the routing rule chooses tokens"),
    ("off_policy_mask_threshold", None, "the routed loss has no such mask"),
    ("entropy_coef", 0.0, "the routed loss has no entropy bonus"),
    ("use_adaptive_entropy", False, "the routed loss has no entropy bonus"),
    ("delta", None, "the routed loss has no second clip"),
    ("chat_template_kwargs", None, "set routed.prompt.thinking"),
    ("fp16", False, "set bf16"),
)  # fmt: skip
# Of GRPOConfig.loss_type, our form of GRPO's term.
_POLICY = {
    "grpo": "grpo",
    "bnpo": "grpo",
    "dapo": "grpo",
    "dr_grpo": "grpo",
    "cispo": "cispo",
    "sapo": "sapo",
}
# Fields of our loss that GRPOConfig sets.
_THEIRS = (
    "policy", "clip_low", "clip_high", "aggregation", "constant_length", "reference_kl",
    "sapo_tau_positive", "sapo_tau_negative", "truncated_importance",
)  # fmt: skip


class RoutedSettings(Config):
    """What `RoutedGRPOTrainer` adds to GRPO. GRPO's own settings are those of `GRPOConfig`."""

    annotator: Annotator = Field(description="Annotator: rule, openai, or one of your own.")
    segment: SegmentConfig = Field(default=SegmentConfig(), description="Segmenting.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Verification.")
    routing: RoutingConfig = Field(
        default=RoutingConfig(), description="Routing; advantages are TRL's."
    )
    prompt: PromptConfig = Field(default=PromptConfig(), description="Prompt templates.")
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="λ over the optimiser's steps."
    )
    teacher: TeacherConfig = Field(default=TeacherConfig(), description="The teacher's weights.")
    loss: LossConfig = Field(
        default=LossConfig(), description="The routed tokens' part of the objective."
    )
    teacher_row_tokens: int = operational(16_384, "Tokens per forward pass of the teacher.", ge=1)


def check_settings(settings: RoutedSettings, args: Any, given: Mapping[str, Any]) -> None:
    """Check what can be found wrong before a model is loaded.

    args: TRL's GRPOConfig; given: the trainer's other arguments by name.

    Raises:
        InputError: another version of trl, or a setting that this trainer does not support.
    """
    if (found := version("trl")) != TRL:
        raise InputError(
            f"trl: is {found}, and this trainer overrides methods of {TRL}, which any release may "
            f"change; `pip install trl=={TRL}`"
        )
    for name in ("peft_config", "tools", "environment_factory", "quantization_config"):
        if given.get(name):
            raise InputError(
                f"{name}: RoutedGRPOTrainer trains all weights of a plain model and calls no "
                "tools; leave it out, or train with `trace-opd train`"
            )
    if args.world_size > 1 or args.deepspeed or args.fsdp:
        raise InputError(
            "RoutedGRPOTrainer runs in one process on one device; for several GPUs use "
            "`torchrun … trace-opd train`"
        )
    for name, value, instead in _FIXED:
        if (found := getattr(args, name)) != value:
            raise InputError(f"GRPOConfig.{name}: is {found}, and has to be {value}: {instead}")
    if args.beta and args.use_bias_correction_kl:
        raise InputError(
            "GRPOConfig.use_bias_correction_kl: has no form in the routed loss; set it to False, "
            "or beta to 0"
        )
    _check_ours(settings)
    loss_config(settings.loss, args)


def _check_ours(settings: RoutedSettings) -> None:
    teacher, routing = settings.teacher, settings.routing
    if teacher.model is not None or teacher.scores is not None:
        raise InputError(
            "teacher: RoutedGRPOTrainer's is the policy itself, periodic, ema or frozen; leave "
            "teacher.model and teacher.scores out, or train with `trace-opd train`"
        )
    if needs_limits(settings.loss.gates):
        raise InputError(
            "loss.gates: a quantile, or the signal importance, measures tokens by the step before, "
            "which TRL's trainer does not keep; give `at`, or train with `trace-opd train`"
        )
    if routing.rule == "surprise" or is_own(routing.rule):
        raise InputError(
            f"routing.rule: {routing.rule} may read the sampler's log-probabilities, which TRL "
            "does not keep; use another rule, or train with `trace-opd train`"
        )
    if routing.overlong != "keep":
        raise InputError(
            f"routing.overlong: is {routing.overlong}, and rewards are TRL's; leave it at keep, "
            "and use GRPOConfig.mask_truncated_completions or a reward function"
        )
    require_scores(routing, None)
    if not needs_annotations(routing):
        return
    annotator: Any = settings.annotator
    if annotator.engine == "none":
        raise InputError("annotator.engine: is none, and this routing reads annotations; name one")
    if annotator.engine == "self" and annotator.policy is None:
        raise InputError(
            "annotator.policy: is not set, and RoutedGRPOTrainer does not annotate with the "
            "weights that it trains; name a policy"
        )
    reflects = getattr(annotator, "reflection", False)
    require_reflections(routing, reflects, "set annotator.reflection=true")


def loss_config(ours: LossConfig, args: Any) -> LossConfig:
    """The routed loss with GRPO's part as a GRPOConfig has it.

    Raises:
        InputError: a form of GRPO that the loss lacks, or a setting given in both places.
    """
    for name in _THEIRS:
        if getattr(ours, name) != LossConfig.model_fields[name].default:
            raise InputError(
                f"loss.{name}: is GRPOConfig's part here; leave it out and set it there"
            )
    if args.loss_type not in _POLICY:
        known = ", ".join(_POLICY)
        raise InputError(f"GRPOConfig.loss_type: {args.loss_type} has no form here; use {known}")
    policy, high = _POLICY[args.loss_type], args.epsilon_high
    if args.importance_sampling_level == "sequence":
        if args.loss_type != "grpo":
            raise InputError(
                "GRPOConfig.importance_sampling_level: is sequence, which is GSPO only with "
                "loss_type grpo; set that"
            )
        policy = "gspo"
    clips = {
        "clip_low": args.epsilon,
        "clip_high": args.epsilon if high is None else high,
    }
    if policy == "cispo":  # TRL's upper bound is the cap itself, and it has no lower one
        if clips["clip_high"] <= 1:
            raise InputError(
                f"GRPOConfig.epsilon_high: is {clips['clip_high']}, and with loss_type cispo it "
                "is the largest ratio itself; set it above 1"
            )
        clips = {"clip_low": 1.0, "clip_high": clips["clip_high"] - 1}
    taus: dict[str, float] = {}
    if policy == "sapo":
        taus = {
            "sapo_tau_positive": args.sapo_temperature_pos,
            "sapo_tau_negative": args.sapo_temperature_neg,
        }
    values = ours.model_dump() | clips | taus | {"policy": policy, "reference_kl": args.beta}
    try:
        return LossConfig.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        at = ".".join(map(str, fault["loc"])) or "loss"
        raise InputError(f"GRPOConfig, {at} of the routed loss: {fault['msg']}") from None
