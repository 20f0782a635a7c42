"""Checks that an engine samples with the trainer's weights: both score a few fixed tokens.

Online training asks the trainer's weights; samplers that follow them (`Follower`) check their
engine's scores. One optimiser step may change log-probabilities by less than two engines differ in
rounding, so close scores prove little. The probe also measures how much of the trainer's own change
the engine's scores show: all of it with the new weights, nothing with the old ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...schemas.configs import PromptConfig
from ...schemas.errors import InputError
from ...trace.prompt import student_prompt
from ...trace.protocols import TrainedPolicy

_MOST_TOKENS = 128  # of each probe
# Mean |difference| between engine and trainer, nats. Measured with SmolLM2-135M: 1e-5 in float32.
_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# A change is judged once its norm is this many times the rounding's; smaller changes add up.
_CLEAR = 4.0
_GO_ON = (
    "restart it and run the same command, which goes on from the last checkpoint, or take "
    "sampler.engine=transformers"
)


class Probe:
    """The trainer's scores of the fixed tokens, and each engine's earlier ones.

    token_ids: the probes; all tokens but the first of each are scored.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, problems: Sequence[str]
    ) -> None:
        """problems: texts; a probe is a problem's prompt followed by its text."""
        self.token_ids: list[list[int]] = []
        for problem in problems:
            ids = student_prompt(tokenizer, prompt, problem).token_ids
            assert ids is not None, "a tokenizer is given"
            again = tokenizer.encode(problem, add_special_tokens=False)
            self.token_ids.append((ids + again)[-_MOST_TOKENS:])
        self._now = np.empty(0)
        self._limit = 0.0
        self._before: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def ask(self, policy: TrainedPolicy) -> None:
        """Score the probes with the trainer's current weights; every rank calls."""
        self._now = np.concatenate(policy.logprobs(self.token_ids))
        self._limit = _LIMIT[policy.compute_dtype]

    def check(self, engine: str, scores: Sequence[Sequence[float] | np.ndarray]) -> float:
        """Compare an engine's log-probabilities of the probes with the trainer's, after the engine
        loaded new weights; returns the mean |difference|, nats.

        Raises:
            InputError: they differ, or the engine's scores do not show the trainer's change.
        """
        theirs = np.concatenate([np.asarray(row, dtype=np.float64) for row in scores])
        gap = float(np.abs(theirs - self._now).mean())
        if not gap <= self._limit:  # NaN too
            differs = (
                f"{engine}: its log-probabilities differ from the trainer's by {gap:.2g} nats in "
                f"the mean, above {self._limit:g}"
            )
            if engine in self._before:
                raise InputError(
                    f"{differs}, though they agreed before: it has loaded only a part of the new "
                    f"weights; {_GO_ON}"
                )
            raise InputError(
                f"{differs}; let it serve policy.path in the trainer's precision "
                "(policy.precision; vllm serve --dtype)"
            )
        if engine not in self._before:
            self._before[engine] = self._now, theirs
            return gap
        ours_before, theirs_before = self._before[engine]
        moved, followed = self._now - ours_before, theirs - theirs_before
        rounding = float(np.linalg.norm(theirs_before - ours_before))
        # An engine that was wrong at first must not count as one that rounds badly.
        rounding = min(rounding, self._limit * len(theirs) ** 0.5)
        size = float(np.linalg.norm(moved))
        if size > _CLEAR * rounding:
            share = float(followed @ moved) / size**2
            if share < 0.5:
                raise InputError(
                    f"{engine}: still has old weights: it shows {share:.0%} of the trainer's "
                    "change "
                    f"since the last update that could be judged; {_GO_ON}"
                )
            self._before[engine] = self._now, theirs
        return gap
