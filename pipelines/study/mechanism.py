"""One optimiser step, looked at closely: python -m trace_opd.pipelines.study.mechanism

On the same rollouts of an arithmetic policy, one step each by GRPO and by TRACE-FKL with each form of
the KL clip. Per objective, in nats, means over key tokens of right responses:

- lift: how much the log-probability of the sampled token rose, over teacher-supported tokens alone,
  those that the teacher with the type label holds likelier than the student (the paper reports +0.145
  for TRACE-FKL and +0.054 for GRPO on Qwen3-8B, METHOD.md);
- to_right, to_wrong: change of KL(teacher ‖ student) for the teacher of before the step with the right
  type, and with another step's type. A student that takes over what the label says, not only what the
  label makes surer, comes nearer to the right one and not to the wrong one.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.table import Table

from ...schemas.configs import (
    PromptConfig,
    RoutingConfig,
    RuleAnnotator,
    SamplingConfig,
    SegmentConfig,
    TrainConfig,
)
from ...schemas.labels import Action, DiagnosticType, KlClip, Route
from ...schemas.settings import override
from ...trace.align import byte_table
from ...trace.batch import training_sequences
from ...trace.convert import routed_table
from ...trace.packing import response_logits
from ...trace.policy import Policy, load_policy
from ...trace.prompt import render_chat, teacher_messages
from ...trace.trainer import Trainer
from ..annotators.rule import StepsAnnotator
from ..micro import (
    NOISE,
    STUDENT_TEMPLATE,
    TEACHER_TEMPLATE,
    UNINFORMATIVE,
    arithmetic_problems,
    exact_verdicts,
)
from ..models import resolve_policy
from ..rollout import rollouts_table
from ..samplers.transformers import TransformersPolicySampler
from ..terminal import console

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
    verdicts = exact_verdicts(problems, rollouts)
    annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
    annotations = annotator.annotate(problems, rollouts, verdicts)
    pieces = byte_table(policy.tokenizer)
    return routed_table(problems, rollouts, verdicts, annotations, pieces, routing)


class Teachers:
    """What a policy holds of the routed tokens of labelled rows, told a type or none."""

    def __init__(self, policy: Policy, routed: pa.Table) -> None:
        self._policy = policy
        self._problems = [str(problem) for problem in routed["problem"].to_pylist()]
        self.sequences = training_sequences(routed, policy.tokenizer, PROMPT, with_teacher=False)
        self.right_types = [DiagnosticType(x) for x in routed["diagnostic_type"].to_pylist()]
        kinds = list(NOISE)
        self.wrong_types = [kinds[kinds.index(kind) - 1] for kind in self.right_types]

    def logprobs(self, types: list[DiagnosticType]) -> torch.Tensor:
        """(routed tokens, vocab) of the teacher that is told these types, one per row."""
        told = zip(self._problems, types, strict=True)
        messages = [teacher_messages(PROMPT, problem, kind) for problem, kind in told]
        prompts = [render_chat(self._policy.tokenizer, one) for one in messages]
        return self._behind(self._policy, prompts)

    def student(self, policy: Policy) -> torch.Tensor:
        """(routed tokens, vocab) of a policy that is told nothing."""
        return self._behind(policy, [s.prompt_ids for s in self.sequences])

    @torch.no_grad()
    def _behind(self, policy: Policy, prompts: list[list[int]]) -> torch.Tensor:
        logits = []
        for at in range(0, len(self.sequences), 16):
            chunk = self.sequences[at : at + 16]
            keep = [s.routed_positions for s in chunk]
            responses = [s.token_ids[: s.routed_end] for s in chunk]
            logits.append(response_logits(policy.model, prompts[at : at + 16], responses, keep))
        return torch.log_softmax(torch.cat(logits).float(), dim=-1)


def label_effect(policy: Policy, problems: pa.Table, seed: int) -> dict[str, Any]:
    """The pass rate at temperature 1 (8 samples a problem), and how much the label matters.

    problems: arithmetic ones. Spans are the rule annotator's, without a coverage cap. Per kind of
    span (key, error) the means over its tokens, in nats, of
    `right_label` and `wrong_label`: KL(teacher ‖ student) with the rollout's label, and with another
    that has a meaning here; `right_to_wrong`: KL between these two teachers; `uninformative`: KL
    between teachers with two labels that have none.
    """
    routing = RoutingConfig(alpha=1.0, key=Action.FKL, error=Action.RKL)
    everything = routed_rollouts(policy, problems, routing, 128, seed)
    routed = everything.filter(pc.is_valid(everything["diagnostic_type"]))
    teachers = Teachers(policy, routed)
    right, wrong = teachers.right_types, teachers.wrong_types
    with_right, with_wrong = teachers.logprobs(right), teachers.logprobs(wrong)
    neutral, other_neutral = (teachers.logprobs([label] * len(right)) for label in UNINFORMATIVE)
    student = teachers.student(policy)
    divergences = {
        "right_label": _kl(with_right, student),
        "wrong_label": _kl(with_wrong, student),
        "right_to_wrong": _kl(with_right, with_wrong),
        "uninformative": _kl(neutral, other_neutral),
    }
    route = np.concatenate([s.route[s.routed_positions] for s in teachers.sequences])
    figures: dict[str, Any] = {
        "rollouts": len(everything),
        "pass_rate": pc.mean(everything["reward"]).as_py(),
    }
    for kind, chosen in (("key", route == Route.FKL), ("error", route == Route.RKL)):
        figures[kind] = {"tokens": int(chosen.sum())} | {
            name: float(values[chosen].mean()) for name, values in divergences.items()
        }
    return figures


def one_step(path: str, lr: float, problems: int, seed: int) -> list[dict[str, Any]]:
    """A row per objective."""
    base = load_policy(path, "cpu")
    routing = RoutingConfig(key=Action.FKL, error=Action.NONE)
    routed = routed_rollouts(base, arithmetic_problems(problems, seed), routing, 96, seed)
    has_key = pa.array([Route.FKL in row["route"] for row in routed.to_pylist()])
    teachers = Teachers(base, routed.filter(has_key))
    with_right = teachers.logprobs(teachers.right_types)
    with_wrong = teachers.logprobs(teachers.wrong_types)
    before = teachers.student(base)
    ids = np.concatenate([s.token_ids[s.routed_positions] for s in teachers.sequences])
    sampled = torch.from_numpy(ids)[:, None]  # (key tokens, 1)
    supported = (with_right.gather(-1, sampled) > before.gather(-1, sampled)).squeeze(-1)
    rows = []
    for name, changes in OBJECTIVES.items():
        policy = load_policy(path, "cpu", trainable=True)
        shared = TrainConfig.model_validate({"online": {"steps": 1}, "optim": {"lr": lr}})
        config = override(shared.model_copy(update={"prompt": PROMPT}), changes)
        with_teacher = config.schedule.w0 > 0
        sequences = training_sequences(routed, policy.tokenizer, PROMPT, with_teacher)
        Trainer(policy, config).train_step(sequences)
        after = teachers.student(policy)
        gain = (after - before).gather(-1, sampled).squeeze(-1)  # (key tokens,)
        rows.append(
            {
                "objective": name,
                "seed": seed,
                "key_tokens": len(ids),
                "supported_tokens": int(supported.sum()),
                "lift": float(gain[supported].mean()),
                "to_right": float((_kl(with_right, after) - _kl(with_right, before)).mean()),
                "to_wrong": float((_kl(with_wrong, after) - _kl(with_wrong, before)).mean()),
            }
        )
    return rows


def _kl(log_q: torch.Tensor, log_p: torch.Tensor) -> np.ndarray:
    """KL(q ‖ p) per token, nats: (tokens,)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="One optimiser step, looked at closely.")
    parser.add_argument("--policy", default="micro")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("studies/micro/mechanism.json"))
    args = parser.parse_args()
    path = resolve_policy(args.policy)
    rows = [r for seed in range(args.seeds) for r in one_step(path, args.lr, args.problems, seed)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"policy": args.policy, "lr": args.lr, "problems": args.problems}
    args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    table = Table("objective", "lift", "to the right teacher", "to a wrong one")
    for name in OBJECTIVES:
        own = [row for row in rows if row["objective"] == name]
        cells = []
        for column in ("lift", "to_right", "to_wrong"):
            values = [row[column] for row in own]
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{mean(values):+.4f} ± {spread:.4f}")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
