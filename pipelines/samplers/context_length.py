"""Find prompts and sequences that are longer than the policy's context before any work.

Stages rollout, evaluate and train call the checks; samplers call `context_length`.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.store import Dataset
from ...schemas.configs import PolicyConfig, PromptConfig
from ...schemas.conversation import COLUMN, History, with_history
from ...schemas.errors import InputError
from ...trace.loading import load_config
from ...trace.policy import load_tokenizer
from ...trace.prompt import student_prompt
from ..models import resolve_policy

# A normaliser may write several characters for one, and a token stands for a byte at least.
_TOKENS_PER_BYTE = 4
_TOKENS_PER_TURN = 64  # more than any template writes around a turn
# Kinds of rotary embeddings whose max_position_embeddings already is the stretched length.
_STRETCHED = ("default", "llama3", "longrope", "su")


def require_room(
    problems: Dataset,
    policy: PolicyConfig,
    context: int | None,
    prompt: PromptConfig,
    max_new_tokens: int,
) -> None:
    """Check that each problem's prompt and a response of full length fit into the context.

    context: tokens; None: unbounded, or a server checks it (`Engine.context`).

    Raises:
        InputError: a prompt that does not fit, with its number of tokens.
    """
    if context is None:
        return
    room = context - max_new_tokens
    tokenizer = load_tokenizer(resolve_policy(policy.path), policy.trust_remote_code)

    def tokens(problem: str, history: History = None) -> int:
        ids = student_prompt(tokenizer, prompt, problem, history).token_ids
        assert ids is not None, "the tokenizer is here"
        return len(ids)

    spare = room - tokens("")
    per_byte = _TOKENS_PER_BYTE * prompt.student.count("{problem}")
    for part in range(problems.parts):
        for problem_id, problem, history in _longer(problems.read_part(part), spare, per_byte):
            if (count := tokens(problem, history)) > room:
                raise InputError(
                    f"dataset {problems.ref}, problem {problem_id}: its prompt of {count} tokens "
                    "and "
                    f"a response of max_new_tokens={max_new_tokens} do not fit into the context of "
                    f"{context} tokens of policy {policy.path}; lower max_new_tokens or drop the "
                    "problem"
                )


def require_short_rows(routed: Dataset, policy: PolicyConfig) -> None:
    """Check that the sequences of a routed dataset fit into the policy's context.

    Another policy may have sampled them.

    Raises:
        InputError: a sequence that does not fit, with its number of tokens.
    """
    context = policy_context(policy)
    if context is None:
        return
    for part in range(routed.parts):
        table = routed.read_part(part, ["rollout_id", "prompt_token_ids", "token_ids"])
        lengths: Any = pc.add(
            pc.list_value_length(table["prompt_token_ids"]),
            pc.list_value_length(table["token_ids"]),
        )
        if (longest := pc.max(lengths).as_py() or 0) > context:
            row = pc.index(lengths, longest).as_py()
            raise InputError(
                f"dataset {routed.ref}, rollout {table['rollout_id'][row]}: its {longest} tokens "
                "do "
                f"not fit into the context of {context} tokens of policy {policy.path}; train the "
                "policy that sampled it, or sample again with a lower max_new_tokens"
            )


def policy_context(policy: PolicyConfig) -> int | None:
    """`context_length` of the model that a policy names."""
    return context_length(load_config(resolve_policy(policy.path), policy.trust_remote_code))


def context_length(config: Any) -> int | None:
    """Most tokens that a model has positions for; None: unbounded (no position embeddings).

    Scaled rotary embeddings (YaRN, linear) multiply max_position_embeddings, as in vLLM.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None)
    if length is None or not isinstance(rope, dict):
        return length
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind in _STRETCHED or not isinstance(factor, int | float):
        return length
    return max(length, int(rope.get("original_max_position_embeddings", length) * factor))


def _longer(problems: pa.Table, spare: int, per_byte: int) -> Iterable[tuple[str, str, History]]:
    """Ids, texts and histories of problems that may be too long; the others need no tokenizer.

    spare: tokens that are left by a prompt without a problem; per_byte: the most of them that a
    byte of the problem takes.
    """
    most: Any = pc.binary_length(problems["problem"]).to_numpy() * per_byte
    if COLUMN in problems.column_names:
        turns: Any = problems[COLUMN].combine_chunks()
        sizes = pc.binary_length(pc.struct_field(pc.list_flatten(turns), "content")).to_numpy()
        rows = pc.list_parent_indices(turns).to_numpy()
        sizes = sizes * _TOKENS_PER_BYTE + _TOKENS_PER_TURN
        most = most + np.bincount(rows, sizes, minlength=len(problems))
    long = problems.filter(pa.array(most > spare))
    for row in long.select(with_history(["problem_id", "problem"], long)).to_pylist():
        yield row["problem_id"], row["problem"], row.get(COLUMN)
