"""A step's metrics: sums over its tokens, and their means.

trainer.py adds up TokenSums over micro-batches and ranks, and writes `step_metrics` of the sums.
Metrics of a route or divergence take their names from the Route enumeration.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from ..schemas.labels import Route
from .losses import DIVERGENCES, LossInputs, LossOutput
from .repetition import ends_in_loop
from .sequences import TrainingSequence, signal_groups
from .transfer import to_device

# Sums over tokens; `loss` already has the weights of the step.
SUMS = (
    "loss", "tokens", "entropy", "ratio_clipped", "drift", "drift_kl", "kl_clipped", "reference_kl",
    *(f"{route.label}_kl" for route in DIVERGENCES),
    *(f"{route.label}_tokens" for route in DIVERGENCES),
    "gate", "gate_closed", "gated_tokens",
)  # fmt: skip


class TokenSums:
    """The sums of a step's micro-batches, on their device: reading them waits for it.

    gated: whether `loss.gates` has some.
    """

    def __init__(self, device: torch.device, gated: bool = False) -> None:
        self._gated = gated
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self._drift = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, output: LossOutput, inputs: LossInputs, with_kl: bool) -> None:
        """Add one micro-batch.

        Drift is the trainer's log-probability of a sampled token minus the sampler's. `drift_kl`
        sums the non-negative estimate of KL(sampler‖trainer), r − 1 − log r with r = e^drift.
        """
        drift = output.logprobs - inputs.old_logprobs
        device = drift.device
        # From the host's copy: a mask on the device would have to be counted, which waits for it.
        kinds = inputs.route.cpu().numpy() if inputs.host_route is None else inputs.host_route
        routed = [np.flatnonzero(kinds == int(route)) for route in DIVERGENCES]
        gated = np.flatnonzero(kinds) if with_kl and self._gated else np.zeros(0, int)
        gates = output.gate[to_device(torch.from_numpy(gated), device)]
        counts = [len(at) if with_kl else 0 for at in routed]
        sums = [
            output.loss,
            torch.ones_like(output.entropy).sum(),
            output.entropy.sum(),
            output.ratio_clipped.sum(),
            drift.abs().sum(),
            (torch.expm1(drift) - drift).sum(),
            output.kl_clipped.sum(),
            output.reference_kl.sum(),
            *(output.kl[to_device(torch.from_numpy(at), device)].sum() for at in routed),
        ]
        ends = [gates.sum(), (gates == 0).sum()]
        added, ended = (torch.stack([x.double() for x in part]) for part in (sums, ends))
        known = to_device(torch.tensor([*counts, len(gated)], dtype=torch.float64), device)
        self._sums += torch.cat((added, known[:-1], ended, known[-1:]))
        largest = drift.abs().max() if len(drift) else drift.sum()
        self._drift = torch.fmax(self._drift, largest.double())  # NaN counts as nothing

    def read(self) -> tuple[list[float], float]:
        """The sums in the order of SUMS, and the largest drift, nats."""
        *sums, largest = torch.cat((self._sums, self._drift[None])).tolist()
        return sums, largest


def step_metrics(
    sequences: Sequence[TrainingSequence],
    sums: dict[str, float],
    largest_drift: float,
    with_reference: bool = False,
) -> dict[str, float]:
    """A step's means, over tokens that the policy wrote. Units: nats, tokens, shares.

    `pass_rate_se` is the standard error of `pass_rate` over the step's problems, and `looping` the
    share of responses that end in a loop (repetition.py).

    sums: TokenSums of the step, over all ranks. A step without sequences (no rollout could be
    scored) changes nothing and has no means; one that trains no token has none over trained tokens.
    """
    if not sequences:
        return {"sequences": 0.0, "tokens": 0.0}
    groups: dict[str, list[bool]] = defaultdict(list)
    for sequence in sequences:
        groups[sequence.group_id].append(sequence.correct)
    lengths = [sequence.policy_tokens for sequence in sequences]
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
        "looping": float(np.mean(ends_in_loop([s.written(s.token_ids) for s in sequences]))),
        "tokens": float(tokens),
    }
    if len(groups) > 1:
        # Over groups, because responses to one problem go together.
        rates = [np.mean(own) for own in groups.values()]
        metrics["pass_rate_se"] = float(np.std(rates, ddof=1) / len(rates) ** 0.5)
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
    if gated := sums["gated_tokens"]:
        metrics["gate_mean"] = sums["gate"] / gated
        metrics["gate_closed"] = sums["gate_closed"] / gated
    return metrics
