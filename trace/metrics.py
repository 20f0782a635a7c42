"""A step's metrics: sums over its tokens, and their means.

trainer.py adds up `token_sums` over micro-batches and ranks, and writes `step_metrics` of the sums.
Metrics of a route or divergence take their names from the Route enumeration.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from ..schemas.labels import Route
from .losses import DIVERGENCES, LossInputs, LossOutput
from .sequences import TrainingSequence, signal_groups

# Sums over a micro-batch's tokens; `loss` already has the weights of the step.
SUMS = (
    "loss", "tokens", "entropy", "ratio_clipped", "drift", "drift_kl", "kl_clipped", "reference_kl",
    *(f"{route.label}_kl" for route in DIVERGENCES),
    *(f"{route.label}_tokens" for route in DIVERGENCES),
)  # fmt: skip


@torch.no_grad()
def token_sums(output: LossOutput, inputs: LossInputs, with_kl: bool) -> tuple[np.ndarray, float]:
    """One micro-batch's sums in the order of SUMS, and its largest drift, nats.

    Drift is the trainer's log-probability of a sampled token minus the sampler's. `drift_kl` sums
    the non-negative estimate of KL(sampler‖trainer), r − 1 − log r with r = e^drift.
    """
    drift = output.logprobs - inputs.old_logprobs
    routed = [inputs.route == int(route) for route in DIVERGENCES]
    sums = [
        output.loss,
        torch.ones_like(output.entropy).sum(),
        output.entropy.sum(),
        output.ratio_clipped.sum(),
        drift.abs().sum(),
        (torch.expm1(drift) - drift).sum(),
        output.kl_clipped.sum(),
        output.reference_kl.sum(),
        *(output.kl[mask].sum() for mask in routed),
        *((mask.sum() if with_kl else mask.sum() * 0) for mask in routed),
    ]
    largest = drift.abs().max() if len(drift) else drift.sum()
    values = torch.stack([x.double() for x in (*sums, largest)]).cpu().numpy()
    return values[:-1], float(values[-1])


def step_metrics(
    sequences: Sequence[TrainingSequence],
    sums: dict[str, float],
    largest_drift: float,
    with_reference: bool = False,
) -> dict[str, float]:
    """A step's means. Units: nats, tokens, shares.

    sums: `token_sums` added up over the step. A step without sequences (no rollout could be scored)
    changes nothing and has no means; one that trains no token has none over trained tokens.
    """
    if not sequences:
        return {"sequences": 0.0, "tokens": 0.0}
    groups: dict[str, list[float]] = defaultdict(list)
    for sequence in sequences:
        groups[sequence.group_id].append(sequence.reward)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    tokens, trained = sum(lengths), sums["tokens"]
    routes = np.bincount(np.concatenate([s.route for s in sequences]), minlength=len(Route))
    rewards = [sequence.reward for sequence in sequences]
    metrics = {
        "sequences": float(len(sequences)),
        "reward": float(np.mean(rewards)),
        "pass_rate": float(np.mean([sequence.correct for sequence in sequences])),
        "groups_without_signal": 1 - len(signal_groups(sequences)) / len(groups),
        "response_tokens": float(np.mean(lengths)),
        "truncated": float(np.mean([sequence.truncated for sequence in sequences])),
        "tokens": float(tokens),
    }
    if trained:
        metrics |= {
            "entropy": sums["entropy"] / trained,
            "ratio_clipped": sums["ratio_clipped"] / trained,
            "sampler_drift": sums["drift"] / trained,
            "sampler_drift_max": largest_drift,
            "sampler_kl": sums["drift_kl"] / trained,
        }
    for route in Route:
        # TRACE's own two routes are reported even at 0.
        own = route in (Route.FKL, Route.RKL) or (route is not Route.GRPO and routes[route])
        if own and tokens:
            metrics[f"coverage_{route.label}"] = routes[route] / tokens
    kl_tokens = 0.0
    for route in DIVERGENCES:
        if routed := sums[f"{route.label}_tokens"]:
            metrics[f"kl_{route.label}"] = sums[f"{route.label}_kl"] / routed
            kl_tokens += routed
    if with_reference and trained:
        metrics["kl_reference"] = sums["reference_kl"] / trained
    if kl_tokens:
        metrics["kl_clipped"] = sums["kl_clipped"] / kl_tokens
    return metrics
