"""The rollouts table takes log-probabilities as lists and as flat arrays."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trace_opd.pipelines.bundled.micro import arithmetic_problems
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.rollouts import rollouts_table
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler
from trace_opd.schemas.configs import PromptConfig, SamplingConfig
from trace_opd.trace.policy import load_policy
from trace_opd.trace.protocols import Completion


class FlatSampler(TransformersPolicySampler):
    """The same responses, with their log-probabilities as arrays, as vLLM's engine gives them."""

    def sample(self, *arguments: Any) -> list[list[Completion]]:
        def flat(logprobs: Sequence[float] | np.ndarray | None) -> np.ndarray:
            return np.asarray(logprobs, np.float32)

        groups = super().sample(*arguments)
        return [[replace(one, logprobs=flat(one.logprobs)) for one in own] for own in groups]


def test_arrays_and_lists_of_logprobs_make_the_same_table():
    policy, problems = load_policy(resolve_policy("micro"), "cpu"), arithmetic_problems(2, seed=0)
    made = [
        rollouts_table(
            problems, sampler(policy, 4096), policy.tokenizer, PromptConfig(),
            SamplingConfig(max_new_tokens=8), group_size=2, seed=0,
        )
        for sampler in (TransformersPolicySampler, FlatSampler)
    ]  # fmt: skip
    assert made[0] == made[1]
    assert made[1]["on_policy"].to_pylist() == [True] * 4
