"""A plain training step with transformers and PyTorch alone: the row `plain` of step.py.

What a straightforward script does: padded micro-batches, the model's logits at response tokens, a
log-softmax in float32, GRPO's clipped ratio to the step's own policy, AdamW.
"""

import torch
from step_case import (
    BETA1,
    BETA2,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Case,
    padded_rows,
)
from step_turns import Turns
from transformers import AutoModelForCausalLM

from trace_opd.trace.align import byte_table
from trace_opd.trace.policy import load_tokenizer

PAD = 0  # masked out; any id would do


def plain(cases: list[Case], turns: Turns, micro_batch_tokens: int, recompute: bool) -> None:
    """Take turns until the process is terminated.

    recompute: compute all layers' activations again in the backward pass.
    """
    device = cases[0].device
    model = AutoModelForCausalLM.from_pretrained(cases[0].path, dtype=torch.float32).to(device)
    if recompute:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (BETA1, BETA2), weight_decay=0.0, fused=device == "cuda"
    )
    table = byte_table(load_tokenizer(cases[0].path))
    while True:
        index, mode = turns.next()
        case = cases[index]
        size = padded_rows(case, micro_batch_tokens)
        rollouts = case.shortened(table) if mode == "warm-up" else case.rollouts
        rows = case.routed(rollouts, table, with_teacher=False).to_pylist()
        turns.begin()
        for start in range(0, len(rows), size):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = grpo(model, rows[start : start + size], device) / len(rows)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.end(sum(len(row["token_ids"]) for row in rows), norm)


def grpo(model: torch.nn.Module, rows: list[dict], device: str) -> torch.Tensor:
    """Sum over responses of the mean of their tokens' losses."""
    prompts = [row["prompt_token_ids"] for row in rows]
    responses = [row["token_ids"] for row in rows]
    before, after = max(map(len, prompts)), max(map(len, responses))
    ids = torch.full((len(rows), before + after), PAD)
    mask = torch.zeros_like(ids)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        part = slice(before - len(prompt), before + len(response))
        ids[index, part] = torch.tensor([*prompt, *response])
        mask[index, part] = 1
    ids, mask = ids.to(device), mask.to(device)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=after + 1).logits[:, :-1]
    log_p = torch.log_softmax(logits.float(), -1)
    logprobs = log_p.gather(2, ids[:, before:, None]).squeeze(2)
    ratio = torch.exp(logprobs - logprobs.detach())
    advantage = torch.tensor([row["advantage"] for row in rows], device=device)[:, None]
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    losses = -torch.min(ratio * advantage, clipped * advantage) * mask[:, before:]
    return (losses.sum(1) / mask[:, before:].sum(1)).sum()
