"""The rollouts table of a policy, for any sampler.

Stages rollout and evaluate, online training and the study sample through `rollouts_table`,
the probe's teacher through `prompted_rollouts`.
"""

from collections.abc import Sequence

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ...data.store import content_hash
from ...schemas.configs import PromptConfig, SamplingConfig
from ...schemas.conversation import COLUMN, with_history
from ...schemas.errors import InputError
from ...schemas.tables import ROLLOUTS
from ...trace.prompt import student_prompt
from ...trace.protocols import PolicyInfo, Prompt, Sampler


def sample_seed(base: int, problem_id: str, sample_index: int) -> int:
    """A sample's own seed: 31 bits from the base seed, the problem and the index."""
    return int(content_hash([base, problem_id, sample_index], 8), 16) & 0x7FFFFFFF


def rollouts_table(
    problems: pa.Table,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: PromptConfig,
    sampling: SamplingConfig,
    group_size: int,
    seed: int,
) -> pa.Table:
    """Sample a group per problem: a rollouts table, groups in the problems' order."""
    asked = problems.select(with_history(["problem_id", "problem"], problems)).to_pylist()
    prompts = [student_prompt(tokenizer, prompt, row["problem"], row.get(COLUMN)) for row in asked]
    ids = [row["problem_id"] for row in asked]
    return prompted_rollouts(ids, prompts, sampler, sampling, group_size, seed)


def prompted_rollouts(
    ids: Sequence[str],
    prompts: Sequence[Prompt],
    sampler: Sampler,
    sampling: SamplingConfig,
    group_size: int,
    seed: int,
) -> pa.Table:
    """Sample a group per prompt; ids: of their problems."""
    seeds = [[sample_seed(seed, i, k) for k in range(group_size)] for i in ids]
    policy = sampler.policy
    who = [policy.name, policy.revision, policy.step]
    how = sampling.semantic()
    rows = []
    groups = sampler.sample(prompts, sampling, seeds)
    for problem_id, group, group_seeds in zip(ids, groups, seeds, strict=True):
        for index, (completion, sample) in enumerate(zip(group, group_seeds, strict=True)):
            known = (
                completion.token_ids,
                completion.logprobs,
                completion.prompt_token_ids or None,
                policy.vocab_fingerprint or None,
            )
            on_policy = all(part is not None for part in known)  # arrays are compared by entry
            rows.append(
                {
                    "rollout_id": content_hash([problem_id, who, how, seed, index]),
                    "problem_id": problem_id,
                    "group_id": content_hash([problem_id, who, how, seed]),
                    "sample_index": index,
                    "prompt_token_ids": completion.prompt_token_ids or [],
                    "token_ids": completion.token_ids if on_policy else [],
                    "logprobs": completion.logprobs if on_policy else [],
                    "response": completion.text,
                    "finish_reason": completion.finish_reason,
                    "policy_name": policy.name,
                    "policy_revision": policy.revision,
                    "policy_step": policy.step,
                    "vocab_fingerprint": policy.vocab_fingerprint,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k,
                    "max_new_tokens": sampling.max_new_tokens,
                    "seed": sample,
                    "on_policy": on_policy,
                }
            )
    return ROLLOUTS.table(rows)


def require_planned(planned: list[str], opened: PolicyInfo) -> None:
    """Raises InputError unless the opened policy is the one that the dataset id stands for."""
    if len(planned) == 1 and planned != [opened.revision]:
        raise InputError(
            f"policy {opened.name}: its files have changed since this run began; give the same "
            "command again, and leave the folder alone until it ends"
        )
