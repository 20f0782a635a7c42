"""Train the bundled `micro` policy from scratch: python -m trace_opd.pipelines.micro

A Qwen3-architecture model of about 1 M parameters with a character tokenizer learns multi-digit
addition, step by step, from noisy demonstrations: a carry is dropped, a sum is off by one, the
answer is copied wrongly, each at its own rate. At temperature 1 it repeats that noise, so its pass
rate leaves room for reinforcement learning. Half of the demonstrations carry a hint (the teacher's
prompt with a diagnostic type); the noise of that type is then left out. So the label really
changes what the teacher predicts (`--measure` prints by how much), and tells no answer.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..data.sources.arithmetic import answer_text, operands, rows, step_text
from ..data.store import content_hash
from ..schemas.configs import (
    ArithmeticSource,
)
from ..schemas.labels import DiagnosticType, VerdictStatus
from ..schemas.tables import PROBLEMS, VERDICTS
from ..trace.policy import load_policy
from .models import MICRO

STUDENT_TEMPLATE = "{problem}"
TEACHER_TEMPLATE = "{problem}\nhint: {diagnostic_type}"
# Rates at which a demonstration goes wrong, by the label of the line that goes wrong.
NOISE = {
    DiagnosticType.CASE_ANALYSIS: 0.20,
    DiagnosticType.ARITHMETIC: 0.12,
    DiagnosticType.FINAL_ANSWER: 0.08,
}
# Labels that no demonstration's noise goes by: hints that change nothing.
UNINFORMATIVE = (DiagnosticType.COUNTING, DiagnosticType.SETUP)
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_DIGITS = 5


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline, four special tokens."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: index for index, token in enumerate(SPECIALS + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIALS[1:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(vocab_size: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def demonstration(rng: random.Random, hint: DiagnosticType | None, problem: tuple[int, int]) -> str:
    """A response to `left+right` with noise; every line follows from the lines as written."""
    left, right = (str(number) for number in problem)
    width = max(len(left), len(right))
    left, right = left.zfill(width), right.zfill(width)
    rates = {kind: 0.0 if kind is hint else rate for kind, rate in NOISE.items()}
    lines, digits, carry = [], [], 0
    for a, b in zip(map(int, reversed(left)), map(int, reversed(right)), strict=True):
        total, carry_out = a + b + carry, (a + b + carry) // 10
        if carry_out and rng.random() < rates[DiagnosticType.CASE_ANALYSIS]:
            carry_out = 0
        elif not carry_out and rng.random() < rates[DiagnosticType.ARITHMETIC]:
            total += 1 if total == 0 or (total < 9 and rng.random() < 0.5) else -1
        lines.append(step_text(a, b, carry, total, carry_out))
        digits.append(total % 10)
        carry = carry_out
    if carry:
        digits.append(carry)
    if rng.random() < rates[DiagnosticType.FINAL_ANSWER]:
        at = rng.randrange(len(digits))
        digits[at] = (digits[at] + rng.choice((1, -1))) % 10
    return "\n".join([*lines, answer_text("".join(map(str, reversed(digits))))])


def sample_chat(rng: random.Random, min_digits: int = 2) -> tuple[str, str]:
    """User turn and noisy response of one demonstration; half of them are hinted."""
    left, right = operands(rng, min_digits, MAX_DIGITS)
    problem = f"{left}+{right}"
    if rng.random() < 0.5:
        return STUDENT_TEMPLATE.format(problem=problem), demonstration(rng, None, (left, right))
    # Mostly the labels that mean something here; the rest so that none is unheard of.
    informative = rng.random() < 0.8
    hint = rng.choice(list(NOISE) if informative else list(DiagnosticType))
    user = TEACHER_TEMPLATE.format(problem=problem, diagnostic_type=hint)
    return user, demonstration(rng, hint, (left, right))


def batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, both (size, length) int64; prompt and padding are −100 in labels."""
    prompts, responses = [], []
    for _ in range(size):
        user, response = sample_chat(rng)
        prompts.append(f"<|user|>{user}<|assistant|>")
        responses.append(f"{response}<|end|>")
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    length = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
    ids = torch.zeros(size, length, dtype=torch.long)
    labels = torch.full((size, length), -100)
    for row, (p, r) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        ids[row, : len(p) + len(r)] = torch.tensor(p + r)
        labels[row, len(p) : len(p) + len(r)] = torch.tensor(r)
    return ids, labels


def pretrain(
    output: Path,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    snapshots: Sequence[int] = (),
    stop_after: int | None = None,
) -> None:
    """Train from scratch into `output`; snapshots: steps after which a copy goes to step-<n> in it.

    stop_after: end there, the learning rate on its way to the end of all `steps`.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"micro/{seed}")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    started = time.perf_counter()
    for step in range(steps):
        warmup, cosine = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * (0.02 + 0.98 * cosine)
        ids, labels = batch(rng, tokenizer, batch_size)
        logits = model(input_ids=ids).logits  # (rows, length, vocab)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s")
            _save(model, tokenizer, output)
        if step + 1 in snapshots:
            _save(model, tokenizer, output / f"step-{step + 1}")
        if step + 1 == stop_after:
            return


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    # bfloat16: half the size on disk; loading it as float32 is exact.
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exact_verdicts(problems: pa.Table, rollouts: pa.Table) -> pa.Table:
    """Verdicts by the last line, character for character: all that this policy's answers need."""
    gold = {row["problem_id"]: row["answer"] for row in problems.to_pylist()}
    verdict = {"status": VerdictStatus.OK, "verifier": "exact", "seconds": 0.0}
    judged = []
    for row in rollouts.select(["rollout_id", "problem_id", "group_id", "response"]).to_pylist():
        last_line = row.pop("response").rpartition("\n")[2]
        correct = last_line == answer_text(gold[row["problem_id"]])
        judged.append(row | verdict | {"reward": float(correct), "correct": correct})
    return VERDICTS.table(judged)


def arithmetic_problems(count: int, seed: int) -> pa.Table:
    """Distinct additions of three to five digits as a problems table."""
    source = ArithmeticSource(kind="arithmetic")
    return PROBLEMS.table(
        row | {"problem_id": content_hash([row["source"], row["problem"]]), "split": "test"}
        for row in islice(rows(source, seed), count)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or measure the micro policy.")
    parser.add_argument("--output", type=Path, default=MICRO)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--snapshots", type=int, nargs="*", default=[], help="steps after which a copy is kept"
    )
    parser.add_argument("--stop-after", type=int, help="steps after which to end early")
    parser.add_argument(
        "--measure", action="store_true", help="measure the model in --output instead of training"
    )
    args = parser.parse_args()
    if args.measure:
        from .study.mechanism import label_effect

        policy = load_policy(str(args.output))
        figures = label_effect(policy, arithmetic_problems(64, args.seed), args.seed)
        print(json.dumps(figures, indent=2))
    else:
        pretrain(
            args.output,
            args.steps,
            args.batch_size,
            args.lr,
            args.seed,
            args.snapshots,
            args.stop_after,
        )


if __name__ == "__main__":
    main()
