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
from ...trace.batch import TrainingSequence, training_sequences
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


def routed_rollouts(policy: Policy, problems: int, seed: int) -> pa.Table:
    """Right responses' key spans routed to FKL, α = 25 %; the rest is GRPO's."""
    asked = arithmetic_problems(problems, seed)
    sampler = TransformersPolicySampler(policy, batch_tokens=65_536)
    sampling = SamplingConfig(max_new_tokens=96)
    rollouts = rollouts_table(asked, sampler, policy.tokenizer, PROMPT, sampling, 8, seed)
    verdicts = exact_verdicts(asked, rollouts)
    annotator = StepsAnnotator(RuleAnnotator(engine="rule"), SegmentConfig())
    annotations = annotator.annotate(asked, rollouts, verdicts)
    routing = RoutingConfig(key=Action.FKL, error=Action.NONE)
    pieces = byte_table(policy.tokenizer)
    return routed_table(asked, rollouts, verdicts, annotations, pieces, routing)


@torch.no_grad()
def key_logprobs(
    policy: Policy, sequences: list[TrainingSequence], prompts: list[list[int]]
) -> torch.Tensor:
    """Log-probabilities (key tokens, vocab) behind the given prompts."""
    logits = []
    for at in range(0, len(sequences), 16):
        chunk = sequences[at : at + 16]
        keep = [s.routed_positions for s in chunk]
        responses = [s.token_ids[: s.routed_end] for s in chunk]
        logits.append(response_logits(policy.model, prompts[at : at + 16], responses, keep))
    return torch.log_softmax(torch.cat(logits).float(), dim=-1)


def one_step(path: str, lr: float, problems: int, seed: int) -> list[dict[str, Any]]:
    """A row per objective."""
    base = load_policy(path, "cpu")
    routed = routed_rollouts(base, problems, seed)
    labelled = routed.filter(pc.is_valid(routed["diagnostic_type"]))
    key = labelled.filter(pa.array([Route.FKL in route for route in labelled["route"].to_pylist()]))
    sequences = training_sequences(key, base.tokenizer, PROMPT, with_teacher=False)
    right = [DiagnosticType(label) for label in key["diagnostic_type"].to_pylist()]
    kinds = list(NOISE)
    wrong = [kinds[kinds.index(label) - 1] for label in right]

    def teacher(labels: list[DiagnosticType]) -> torch.Tensor:
        told = zip(key["problem"].to_pylist(), labels, strict=True)
        messages = [teacher_messages(PROMPT, problem, label) for problem, label in told]
        return key_logprobs(base, sequences, [render_chat(base.tokenizer, m) for m in messages])

    with_right, with_wrong = teacher(right), teacher(wrong)
    prompts = [s.prompt_ids for s in sequences]
    before = key_logprobs(base, sequences, prompts)
    sampled = torch.from_numpy(np.concatenate([s.token_ids[s.routed_positions] for s in sequences]))

    def of_sampled(log_p: torch.Tensor) -> torch.Tensor:
        return log_p.gather(-1, sampled[:, None]).squeeze(-1)  # (key tokens,)

    supported = of_sampled(with_right) > of_sampled(before)
    rows = []
    for name, changes in OBJECTIVES.items():
        policy = load_policy(path, "cpu", trainable=True)
        shared = TrainConfig.model_validate({"online": {"steps": 1}, "optim": {"lr": lr}})
        config = override(shared.model_copy(update={"prompt": PROMPT}), changes)
        trainer = Trainer(policy, config)
        with_teacher = config.schedule.w0 > 0
        trainer.train_step(training_sequences(routed, policy.tokenizer, PROMPT, with_teacher))
        after = key_logprobs(policy, sequences, prompts)
        gain = of_sampled(after) - of_sampled(before)
        rows.append(
            {
                "objective": name,
                "seed": seed,
                "key_tokens": len(sampled),
                "supported_tokens": int(supported.sum()),
                "lift": float(gain[supported].mean()),
                "to_right": _nearer(with_right, before, after),
                "to_wrong": _nearer(with_wrong, before, after),
            }
        )
    return rows


def _nearer(teacher: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """Change of KL(teacher ‖ student), nats per token."""
    q = teacher.exp()
    return float((q * (before - after)).sum(-1).mean())


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
