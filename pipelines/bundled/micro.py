"""Pre-training of the bundled `micro` policy (the command is pipelines/micro.py), and its problems.

A Qwen3-architecture model of about 1 M parameters with a character tokenizer learns multi-digit
addition, step by step, from noisy demonstrations (demonstrations.py). At temperature 1 it repeats
that noise, so its pass rate leaves room for reinforcement learning. The noise of a hinted type is
left out, so the label changes the teacher's predictions (`--measure` prints by how much) without
giving away an answer.
"""

import copy
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
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ...data.sources.arithmetic import answer_text, rows
from ...data.store import content_hash
from ...schemas.configs import ArithmeticSource
from ...schemas.errors import InputError
from ...schemas.labels import VerdictStatus
from ...schemas.tables import PROBLEMS, VERDICTS
from ...trace.policy import load_policy, load_tokenizer, vocab_fingerprint
from .demonstrations import Mixture, sample_chat, sample_marking

SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_WARMUP_STEPS, _WARMUP_STEPS_CONTINUED = 100, 20


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


def batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int, mixture: Mixture
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, both (rows, length) int64; prompt and padding are −100 in labels.

    Markings are longer, so a batch of them has half the rows.
    """
    chats = []
    if mixture.prompt is not None and rng.random() < mixture.marking:
        for _ in range(size // 2):
            system, user, answer = sample_marking(
                rng, mixture.prompt, mixture.subtraction, mixture.world
            )
            chats.append((f"<|system|>{system}<|user|>{user}<|assistant|>", f"{answer}<|end|>"))
    else:
        for _ in range(size):
            user, response = sample_chat(rng, mixture.subtraction, mixture.world)
            chats.append((f"<|user|>{user}<|assistant|>", f"{response}<|end|>"))
    prompts, responses = (
        [torch.tensor(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        for texts in zip(*chats, strict=True)
    )
    pairs = list(zip(prompts, responses, strict=True))
    ids = [torch.cat(pair) for pair in pairs]
    labels = [torch.cat((torch.full_like(prompt, -100), answer)) for prompt, answer in pairs]
    return pad_sequence(ids, True, 0), pad_sequence(labels, True, -100)


def pretrain(
    output: Path,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    snapshots: Sequence[int],
    mixture: Mixture,
    start: str | None = None,
) -> None:
    """Train into `output`.

    snapshots: steps after which a copy is saved in its folder step-<n>. start: folder of a policy
    like micro to continue from; None: from scratch.

    Raises:
        InputError: a start with other tokens.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"micro/{seed}")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer)) if start is None else _continued(start, tokenizer)
    warmup_steps = _WARMUP_STEPS if start is None else _WARMUP_STEPS_CONTINUED
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    started = time.perf_counter()
    for step in range(steps):
        warmup = min(1.0, (step + 1) / warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * (0.02 + 0.98 * cosine)
        ids, labels = batch(rng, tokenizer, batch_size, mixture)
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


def _continued(start: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model of a policy in float32."""
    if vocab_fingerprint(load_tokenizer(start)) != vocab_fingerprint(tokenizer):
        raise InputError(
            f"policy {start}: has other tokens than micro; start from micro, a folder of "
            "studies/micro-bases or another world's base"
        )
    return load_policy(start, "cpu", trainable=True).model


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    # bfloat16: half the size on disk; loading it as float32 is exact.
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exact_verdicts(problems: pa.Table, rollouts: pa.Table) -> pa.Table:
    """Verdicts by exact comparison of the last line, which suffices for this policy's answers."""
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
