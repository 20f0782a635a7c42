"""The effect of one optimiser step, and of a type label, at key tokens.

first_steps.py calls `first_step` and `one_step`, pipelines/micro.py `label_effect`. `one_step`
takes the rollouts of a run's first step and, from the run's own base and settings, makes one step
each with GRPO and with TRACE-FKL under each form of the KL clip. Per objective, means over key
tokens of right responses, in nats:

- lift: rise of the sampled token's log-probability, over teacher-supported tokens alone, those to
  which the teacher with the type label gives more probability than the student does (the paper
  reports +0.145 for TRACE-FKL and +0.054 for GRPO on Qwen3-8B, METHOD.md);
- kl_clipped: share of the KL's tokens at which the clip bound;
- to_right, to_wrong: change of KL(teacher ‖ student), with the teacher of before the step, for the
  right type and for another type of the same annotations. A student that learns the label's
  content, not only its sharpening, comes nearer to the right one and not to the wrong one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ...data.dataset import get_dataset
from ...data.store import Dataset
from ...schemas.configs import (
    PromptConfig,
    RoutingConfig,
    RuleAnnotator,
    SamplingConfig,
    SegmentConfig,
    TrainConfig,
)
from ...schemas.conversation import COLUMN, with_history
from ...schemas.errors import InputError
from ...schemas.labels import DiagnosticType, ErrorType, KlClip, Route, TypeLabel, type_label
from ...schemas.settings import override
from ...trace.align import byte_table
from ...trace.packing import response_logits
from ...trace.policy import Policy, load_policy
from ...trace.prompt import render_chat, teacher_messages
from ...trace.routed import routed_table
from ...trace.sequences import training_sequences
from ...trace.trainer import Trainer
from ..annotators.rule import StepsAnnotator
from ..bundled.demonstrations import NOISE, STUDENT_TEMPLATE, TEACHER_TEMPLATE, UNINFORMATIVE
from ..bundled.micro import exact_verdicts
from ..models import resolve_policy
from ..probe.measure import other_kind
from ..samplers.rollouts import rollouts_table
from ..samplers.transformers import TransformersPolicySampler

PROMPT = PromptConfig(student=STUDENT_TEMPLATE, teacher=TEACHER_TEMPLATE)
OBJECTIVES = {"grpo": ["schedule.w0=0"]} | {
    f"trace-fkl, clip {form}": [f"loss.kl_clip={form}"] for form in KlClip
}


def routed_rollouts(
    policy: Policy, problems: pa.Table, routing: RoutingConfig, max_new_tokens: int, seed: int
) -> pa.Table:
    """Eight samples a problem, annotated by rule and routed."""
    sampler = TransformersPolicySampler(policy, batch_tokens=65_536)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    rollouts = rollouts_table(problems, sampler, policy.tokenizer, PROMPT, sampling, 8, seed)
    return routed_of(policy, problems, rollouts, exact_verdicts(problems, rollouts), routing)


def routed_of(
    policy: Policy,
    problems: pa.Table,
    rollouts: pa.Table,
    verdicts: pa.Table,
    routing: RoutingConfig,
) -> pa.Table:
    """Rollouts with verdicts, annotated by rule and routed."""
    annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
    annotations = annotator.annotate(problems, rollouts, verdicts)
    pieces = byte_table(policy.tokenizer)
    return routed_table(problems, rollouts, verdicts, annotations, pieces, routing)


class Teachers:
    """Log-probabilities at the routed tokens of labelled rows, with a type label or without.

    right_types, wrong_types: one per row; a wrong one is the one before it in `kinds`.
    """

    def __init__(
        self,
        policy: Policy,
        routed: pa.Table,
        prompt: PromptConfig,
        kinds: Sequence[TypeLabel],
    ) -> None:
        self._policy, self._prompt = policy, prompt
        self._problems = routed.select(with_history(["problem"], routed)).to_pylist()
        self.sequences = training_sequences(routed, policy.tokenizer, prompt, with_teacher=False)
        self.right_types = [type_label(x) for x in routed["diagnostic_type"].to_pylist()]
        self.wrong_types = [other_kind(kinds, kind) for kind in self.right_types]

    def logprobs(self, types: Sequence[TypeLabel]) -> torch.Tensor:
        """(routed tokens, vocab) of the teacher with these types, one per row."""
        prompts = [
            render_chat(
                self._policy.tokenizer,
                teacher_messages(self._prompt, row["problem"], kind, row.get(COLUMN)),
            )
            for row, kind in zip(self._problems, types, strict=True)
        ]
        return self._after(self._policy, prompts)

    def student(self, policy: Policy) -> torch.Tensor:
        """(routed tokens, vocab) of a policy without a label."""
        return self._after(policy, [s.prompt_ids for s in self.sequences])

    @torch.no_grad()
    def _after(self, policy: Policy, prompts: list[list[int]]) -> torch.Tensor:
        logits = []
        for at in range(0, len(prompts), 16):
            chunk = self.sequences[at : at + 16]
            keep = [s.routed_positions for s in chunk]
            responses = [s.token_ids[: s.routed_end] for s in chunk]
            logits.append(response_logits(policy.model, prompts[at : at + 16], responses, keep))
        return torch.log_softmax(torch.cat(logits).float(), dim=-1)


def label_effect(policy: Policy, problems: pa.Table, seed: int) -> dict[str, Any]:
    """The pass rate at temperature 1 (8 samples a problem), and the effect of the label.

    problems: arithmetic ones. Spans are the rule annotator's, without a coverage cap. Per kind of
    span (key, error) the means over its tokens, in nats, of `right_label` and `wrong_label`:
    KL(teacher ‖ student) with the rollout's label, and with another meaningful one;
    `right_to_wrong`: KL between these two teachers; `uninformative`: KL between teachers with two
    labels without a meaning here.
    """
    routing = RoutingConfig(alpha=1.0, key=Route.FKL, error=Route.RKL)
    everything = routed_rollouts(policy, problems, routing, 128, seed)
    routed = everything.filter(pc.is_valid(everything["diagnostic_type"]))
    teachers = Teachers(policy, routed, PROMPT, list(NOISE))
    right, wrong = teachers.right_types, teachers.wrong_types
    with_right, with_wrong = teachers.logprobs(right), teachers.logprobs(wrong)
    neutral, other_neutral = (teachers.logprobs([label] * len(right)) for label in UNINFORMATIVE)
    student = teachers.student(policy)
    divergences = {
        "right_label": kl_per_token(with_right, student),
        "wrong_label": kl_per_token(with_wrong, student),
        "right_to_wrong": kl_per_token(with_right, with_wrong),
        "uninformative": kl_per_token(neutral, other_neutral),
    }
    route = np.concatenate([s.route[s.routed_positions] for s in teachers.sequences])
    figures: dict[str, Any] = {
        "rollouts": len(everything),
        "pass_rate": pc.mean(everything["reward"]).as_py(),
    }
    for kind, chosen in (("key", route == Route.FKL), ("error", route == Route.RKL)):
        figures[kind] = {"tokens": int(chosen.sum())} | {
            name: float(values[chosen].mean()) if chosen.any() else None
            for name, values in divergences.items()
        }
    return figures


def first_step(run: Dataset) -> pa.Table:
    """The routed rows of a train dataset's first online step.

    Raises:
        InputError: a run without online steps.
    """
    tables = run.summary["tables"]
    if "routed" not in tables:
        raise InputError(
            f"{run.ref}: has no online steps; mechanism needs an arm with online steps"
        )
    return get_dataset(run.files, tables["routed"]).read_part(0)


def has_key_tokens(routed: pa.Table) -> bool:
    """Whether any row has a token under the FKL."""
    return any(_with_key_tokens(routed))


def _with_key_tokens(routed: pa.Table) -> list[bool]:
    return [Route.FKL in row["route"] for row in routed.select(["route"]).to_pylist()]


def one_step(config: TrainConfig, routed: pa.Table) -> list[dict[str, Any]]:
    """A row per objective; config: of the run that made these rows.

    Raises:
        InputError: no right response has a key token.
    """
    path = resolve_policy(config.policy.path)
    base = _load(config, path, trainable=False)
    if not has_key_tokens(routed):
        raise InputError("no rollout of the first step has a token on the FKL route; take more")
    labelled = routed.filter(pa.array(_with_key_tokens(routed)))
    teachers = Teachers(base, labelled, config.prompt, kinds_in_use(routed))
    with_right = teachers.logprobs(teachers.right_types)
    with_wrong = teachers.logprobs(teachers.wrong_types)
    before = teachers.student(base)
    ids = np.concatenate([s.token_ids[s.routed_positions] for s in teachers.sequences])
    sampled = torch.from_numpy(ids).to(before.device)[:, None]  # (key tokens, 1)
    supported = (with_right.gather(-1, sampled) > before.gather(-1, sampled)).squeeze(-1)
    rows = []
    for name, changes in OBJECTIVES.items():
        policy = _load(config, path, trainable=True)
        own = override(config, changes)
        with_teacher = own.schedule.w0 > 0
        sequences = training_sequences(routed, policy.tokenizer, own.prompt, with_teacher)
        metrics = Trainer(policy, own).train_step(sequences)
        after = teachers.student(policy)
        gain = (after - before).gather(-1, sampled).squeeze(-1)  # (key tokens,)
        rows.append(
            {
                "objective": name,
                "seed": config.seed,
                "key_tokens": len(ids),
                "supported_tokens": int(supported.sum()),
                "kl_clipped": metrics.get("kl_clipped") if with_teacher else None,
                "lift": float(gain[supported].mean()) if supported.any() else None,
                "to_right": float(
                    (kl_per_token(with_right, after) - kl_per_token(with_right, before)).mean()
                ),
                "to_wrong": float(
                    (kl_per_token(with_wrong, after) - kl_per_token(with_wrong, before)).mean()
                ),
            }
        )
    return rows


def kinds_in_use(routed: pa.Table) -> list[TypeLabel]:
    """The rows' types without `other` and `other_mistake`, which have no content; all of
    DiagnosticType if fewer than two remain.
    """
    named = {type_label(kind) for kind in pc.drop_null(routed["diagnostic_type"]).to_pylist()}
    used = sorted(named - {DiagnosticType.OTHER, ErrorType.OTHER_MISTAKE})
    return used if len(used) > 1 else list(DiagnosticType)


def _load(config: TrainConfig, path: str, trainable: bool) -> Policy:
    return load_policy(
        path,
        config.policy.device,
        config.policy.precision,
        trainable=trainable,
        lora=config.lora if trainable else None,
        trust_remote_code=config.policy.trust_remote_code,
    )


def kl_per_token(log_q: torch.Tensor, log_p: torch.Tensor) -> np.ndarray:
    """KL(q ‖ p) per token, nats: (tokens,)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1).cpu().numpy()
