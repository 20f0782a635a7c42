"""Routed tables to sequences, and logits at response tokens."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import GateConfig, LossConfig, PromptConfig
from trace_opd.schemas.labels import DiagnosticType
from trace_opd.schemas.tables import ROUTED
from trace_opd.trace.packing import response_logits
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import render_chat, teacher_messages
from trace_opd.trace.sequences import loss_inputs, training_sequences

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
    assert (sequence.logprobs.dtype, sequence.route.dtype) == (np.float32, np.uint8)
    assert loss_inputs([sequence], [1.0], torch.device("cpu")).token_ids.dtype == torch.int64
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


ROWS = table(
    *(
        routed_row(f"r{tokens}", [tokens % 2] * tokens, "counting") | {"prompt_token_ids": prompt}
        for tokens, prompt in ((3, [5, 6]), (1, [7]), (4, [8, 9, 10]), (5, [5]), (2, [6, 6]))
    )
)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS.slice(1, 3),
        pa.concat_tables([ROWS.slice(3), ROWS.slice(1, 2), ROWS.slice(2, 0), ROWS.slice(0, 1)]),
        ROWS.take(pa.array([4, 0, 0])),
        ROWS.slice(2, 0),
        ROWS.schema.empty_table(),
    ],
    ids=["whole", "sliced", "chunked and sliced", "taken", "empty slice", "no chunk"],
)
def test_sequences_hold_the_rows_of_sliced_and_chunked_tables(rows, policy):
    sequences = training_sequences(rows, policy.tokenizer, PROMPT)
    for sequence, row in zip(sequences, rows.to_pylist(), strict=True):
        assert sequence.token_ids.tolist() == row["token_ids"]
        assert sequence.logprobs.tolist() == row["logprobs"]
        assert sequence.route.tolist() == row["route"]
        assert sequence.prompt_ids == row["prompt_token_ids"]
        assert (sequence.rollout_id, sequence.advantage) == (row["rollout_id"], row["advantage"])
        assert (sequence.teacher_prompt_ids is None) == (len(row["route"]) % 2 == 0)


def test_a_sequences_arrays_are_the_tables_memory(policy):
    first = training_sequences(ROWS, policy.tokenizer, PROMPT)[0]
    column = ROWS["token_ids"].chunk(0).values.to_numpy()
    assert np.shares_memory(first.token_ids, column)


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


# --- the teacher's prompts beyond TRACE's ---


def contrasted(row: dict, texts: list[str] | None) -> dict:
    return row | {"contrast_contexts": texts}


def test_a_rows_contrasts_are_prompts_of_their_texts(policy):
    asked = PromptConfig(privileged="{problem} {context}")
    rows = table(
        contrasted(routed_row("a", [0, 4, 1], "counting"), ["3", ""]),
        contrasted(routed_row("b", [0, 0, 0], None), None),
    )
    first, second = training_sequences(rows, policy.tokenizer, asked)
    shown = render_chat(policy.tokenizer, [{"role": "user", "content": "1+2 3"}])
    assert first.contrast_prompt_ids == (shown, [5, 6])  # none: the student's own ids
    assert first.contrast_positions.tolist() == [1]
    assert (first.contrast_end, first.routed_end) == (2, 3)
    assert (second.contrast_prompt_ids, second.contrast_end) == ((), 0)
    (without, _) = training_sequences(rows, policy.tokenizer, asked, with_teacher=False)
    assert without.contrast_prompt_ids == ()


def test_no_context_is_rendered_anew_if_the_teacher_alone_thinks(policy):
    tokenizer = load_policy(resolve_policy("micro"), "cpu").tokenizer
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{% if enable_thinking %}={% endif %}"
    row = routed_row("a", [1, 1, 0], "counting") | {"teacher_context": ""}
    config = PromptConfig(thinking=False, teacher_thinking=True)
    (sequence,) = training_sequences(table(row), tokenizer, config)
    assert tokenizer.decode(sequence.teacher_prompt_ids) == "1+2="
    # The turns begin differently, so the first token is GRPO's; the table keeps its own.
    assert sequence.route.tolist() == [0, 1, 0]
    (same,) = training_sequences(table(row), tokenizer, PromptConfig(thinking=False))
    assert (same.teacher_prompt_ids, same.route.tolist()) == ([5, 6], [1, 1, 0])


def test_inputs_that_only_some_configs_need_are_made_for_them_alone(policy):
    rows = training_sequences(
        table(routed_row("a", [0, 1], "counting"), routed_row("b", [1, 1, 1, 0], "counting")),
        policy.tokenizer,
        PROMPT,
    )
    rows[1] = replace(rows[1], correct=False)
    cpu = torch.device("cpu")
    plain = loss_inputs(rows, [1.0, 1.0], cpu, LossConfig())
    assert (plain.position, plain.kl_scale, plain.sequence, plain.contrast_logprobs) == (None,) * 4
    gate = GateConfig(of="position", shape="below", at=0.5)
    asked = LossConfig(gates=[gate], key_weight=2.0, error_weight=-1.0, policy="gspo")
    made = loss_inputs(rows, [1.0, 1.0], cpu, asked)
    assert made.position.tolist() == [0.25, 0.75, 0.125, 0.375, 0.625, 0.875]
    assert made.kl_scale.tolist() == [2, 2, -1, -1, -1, -1]
    assert made.sequence.tolist() == [0, 0, 1, 1, 1, 1]
    assert (made.position.dtype, made.kl_scale.dtype) == (torch.float32, torch.float32)
    assert made.sequence.dtype == torch.int64
