"""Routed tables to sequences, and logits at response tokens."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import PromptConfig
from trace_opd.schemas.labels import DiagnosticType
from trace_opd.schemas.tables import ROUTED
from trace_opd.trace.packing import response_logits
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import render_chat, teacher_messages
from trace_opd.trace.sequences import (
    training_sequences,
)

PROMPT = PromptConfig(teacher="{problem} {diagnostic_type}")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


def routed_row(rollout_id: str, route: list[int], diagnostic_type: str | None) -> dict:
    tokens = len(route)
    return {
        "rollout_id": rollout_id, "problem_id": "p", "group_id": "g", "problem": "1+2",
        "prompt_token_ids": [5, 6], "token_ids": list(range(10, 10 + tokens)),
        "logprobs": [-0.5] * tokens, "temperature": 0.75, "reward": 1.0, "advantage": 0.5,
        "correct": True, "truncated": False, "route": route,
        "span_id": [0 if r else -1 for r in route], "diagnostic_type": diagnostic_type,
        "teacher_context": None,
        "coverage": 0.25, "dropped_tokens": 0, "policy_name": "micro", "policy_revision": "r",
        "policy_step": 0, "vocab_fingerprint": "v",
    }  # fmt: skip


def table(*rows: dict) -> pa.Table:
    return ROUTED.table(rows)


def test_a_row_becomes_a_sequence_with_the_samplers_own_ids(policy):
    (sequence,) = training_sequences(
        table(routed_row("a", [0, 1, 1, 0], "arithmetic")), policy.tokenizer, PROMPT
    )
    assert (sequence.rollout_id, sequence.group_id) == ("a", "g")
    assert (sequence.prompt_ids, sequence.token_ids.tolist()) == ([5, 6], [10, 11, 12, 13])
    assert (sequence.advantage, sequence.reward, sequence.temperature) == (0.5, 1.0, 0.75)
    assert (sequence.token_ids.dtype, sequence.logprobs.dtype) == (np.int64, np.float32)
    assert sequence.routed_positions.tolist() == [1, 2]
    assert sequence.routed_end == 3


def test_only_rows_with_routed_tokens_get_a_teachers_prompt(policy):
    rows = table(
        routed_row("routed", [0, 2], "counting"),
        routed_row("plain", [0, 0], None),
        routed_row("spans without action", [0, 0], "setup"),
    )
    routed, plain, no_action = training_sequences(rows, policy.tokenizer, PROMPT)
    expected = teacher_messages(PROMPT, "1+2", DiagnosticType.COUNTING)
    assert routed.teacher_prompt_ids == render_chat(policy.tokenizer, expected)
    assert plain.teacher_prompt_ids is None
    assert no_action.teacher_prompt_ids is None
    assert plain.routed_end == 0


def test_without_a_teacher_no_prompt_is_made(policy):
    (sequence,) = training_sequences(
        table(routed_row("a", [1, 1], "arithmetic")), policy.tokenizer, PROMPT, with_teacher=False
    )
    assert sequence.teacher_prompt_ids is None


def naive_logits(model: torch.nn.Module, prompt: list[int], response: np.ndarray) -> torch.Tensor:
    """One row alone, all positions: (response tokens, vocab)."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1]


@torch.no_grad()
def test_logits_of_packed_rows_equal_those_of_each_row_alone(policy):
    prompts = [[6, 20, 21, 7], [6, 30, 31, 32, 33, 34, 35, 7], [7]]
    responses = [np.array([40, 41, 42]), np.array([50]), np.array([60, 61, 62, 63, 64])]
    keep = [np.array([0, 2]), np.array([0]), np.array([1, 3, 4])]
    got = response_logits(policy.model, prompts, responses, keep)
    expected = [
        naive_logits(policy.model, p, r)[k]
        for p, r, k in zip(prompts, responses, keep, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_row_without_kept_tokens_gives_no_logits(policy):
    responses = [np.array([40, 41]), np.array([50])]
    keep = [np.array([], dtype=int), np.array([0])]
    got = response_logits(policy.model, [[6, 7], [6, 8]], responses, keep)
    torch.testing.assert_close(got, naive_logits(policy.model, [6, 8], responses[1]))


@torch.no_grad()
def test_a_models_final_softcap_is_applied():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    response = np.array([4, 5, 6])
    got = response_logits(model, [[1, 2]], [response], [np.arange(3)])
    assert got.abs().max() <= 0.05
    torch.testing.assert_close(got, naive_logits(model, [1, 2], response))
