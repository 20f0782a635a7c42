"""Uses a divergence `jeffreys` that this repository does not have, from config to metrics.

Run by test_add_divergence.py, which adds it to a scratch copy of the package.
"""

import json
import sys
from pathlib import Path

import torch

import trace_opd
from trace_opd.schemas.configs import (
    ConvertConfig,
    LossConfig,
    OfflineConfig,
    PromptConfig,
    TrainConfig,
)
from trace_opd.schemas.contract import validate
from trace_opd.schemas.labels import Route
from trace_opd.schemas.settings import dump_config, load_config
from trace_opd.schemas.tables import ROUTED
from trace_opd.trace.fused import routed_loss
from trace_opd.trace.losses import Head, LossInputs
from trace_opd.trace.policy import load_policy
from trace_opd.trace.sequences import training_sequences
from trace_opd.trace.trainer import Trainer


def gradients() -> dict[str, list[float]]:
    """The loss's gradient in the logits of one token, and autograd's of the formula."""
    route = Route["JEFFREYS"]
    own = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.2, 0.4, 0.1]], dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    inputs = LossInputs(
        torch.tensor([0]), zero, zero, one, one, torch.tensor([route], dtype=torch.uint8)
    )
    head = Head(torch.eye(3, dtype=torch.float64))
    config = LossConfig(grpo=False)
    ours = routed_loss(own, head, inputs, config, 1.0, 0.0, teacher, head).loss
    log_p, log_q = own.log_softmax(-1), teacher.log_softmax(-1)
    theirs = ((log_q.exp() - log_p.exp()) * (log_q - log_p)).sum()
    return {
        name: torch.autograd.grad(loss, own, retain_graph=True)[0].flatten().tolist()
        for name, loss in (("fused", ours), ("formula", theirs))
    }


def metrics(model: str) -> dict[str, float]:
    """Metrics of one optimiser step on two responses, two tokens of one routed."""
    routes = [[Route.GRPO, Route["JEFFREYS"], Route["JEFFREYS"]], [Route.GRPO] * 3]
    rows = [
        {
            "rollout_id": f"r{index}", "problem_id": "p", "group_id": "g", "problem": "1 + 1 = ?",
            "prompt_token_ids": [5, 6], "token_ids": [7, 8, 9], "logprobs": [-1.0] * 3,
            "temperature": 1.0, "reward": 1.0 - index, "advantage": 1.0 - 2 * index,
            "correct": not index, "truncated": False, "route": [int(route) for route in route_row],
            "span_id": [0] * 3, "diagnostic_type": "arithmetic", "teacher_context": None,
            "coverage": 0.5, "dropped_tokens": 0, "policy_name": "micro", "policy_revision": "",
            "policy_step": 0, "vocab_fingerprint": "",
        }
        for index, route_row in enumerate(routes)
    ]  # fmt: skip
    policy = load_policy(model, "cpu")
    trainer = Trainer(policy, TrainConfig(offline=OfflineConfig(steps=1)))
    table = validate(ROUTED.table(rows), ROUTED)
    return trainer.train_step(training_sequences(table, policy.tokenizer, PromptConfig()))


if __name__ == "__main__":
    config = load_config(ConvertConfig, None, ["routing.key=jeffreys"])
    found = {
        "package": str(Path(trace_opd.__file__).parent),
        "route": int(config.routing.key),
        "yaml": dump_config(config),
        "gradients": gradients(),
        "metrics": metrics(sys.argv[1]),
    }
    print(json.dumps(found))
