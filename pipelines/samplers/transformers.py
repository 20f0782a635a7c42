"""Engine transformers: samples with a model in this process, batched, KV-cached, seeded per sample.

A prompt's key-value cache is computed once and repeated for its group; finished rows leave the
batch. Each sample draws from its own random stream by inverting the cumulative distribution, so a
sample's randomness does not depend on the rest of its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from transformers import DynamicCache, PreTrainedTokenizerBase

from ...schemas.configs import PolicyConfig, SamplingConfig, TransformersSampler
from ...schemas.labels import FinishReason
from ...trace.align import byte_table
from ...trace.policy import Policy, end_token_ids, load_policy
from ...trace.protocols import Completion, PolicyInfo, Prompt
from ..models import resolve_policy
from ..progress import count_tokens
from .constrained import Grammars
from .context_length import context_length, policy_context
from .engine import Engine, Training, local_identity

_COMPACT_BELOW = 0.75


@dataclass
class _Row:
    """An unfinished sample: indices of its prompt and seed, and the state of its schema's
    matcher.
    """

    prompt: int
    sample: int
    token_ids: list[int]
    logprobs: list[float]
    matcher: LLMatcher | None = None


class TransformersEngine:
    """See `Engine`."""

    served = False
    follows = False

    def __init__(self, config: TransformersSampler, policy: PolicyConfig) -> None:
        self.batch_tokens: int | None = config.batch_tokens
        self._config, self._policy = config, policy

    def identity(self) -> list[str]:
        return local_identity(self._policy)

    def context(self) -> int | None:
        return policy_context(self._policy)

    def open(self) -> tuple["TransformersPolicySampler", PreTrainedTokenizerBase]:
        policy = load_policy(
            resolve_policy(self._policy.path),
            self._policy.device,
            self._policy.precision,
            trust_remote_code=self._policy.trust_remote_code,
        )
        return TransformersPolicySampler(policy, self._config.batch_tokens), policy.tokenizer

    def open_in_training(self, training: Training) -> "TransformersPolicySampler":
        return TransformersPolicySampler(training.policy, self._config.batch_tokens)


class TransformersPolicySampler:
    """Samples from a loaded policy, with the weights that it has at each call."""

    def __init__(self, policy: Policy, batch_tokens: int) -> None:
        self._policy = policy
        self._batch_tokens = batch_tokens
        self._bytes = byte_table(policy.tokenizer)
        self._ends = torch.tensor(end_token_ids(policy.model, policy.tokenizer))
        self._grammars: Grammars | None = None

    @property
    def policy(self) -> PolicyInfo:
        return self._policy.info

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its response together; None: unbounded."""
        return context_length(self._policy.model.config)

    def close(self) -> None:
        """Nothing to release: the policy belongs to the caller."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`.

        Raises:
            InputError: schemas that can't be compiled, or that the vocabulary can't write.
        """
        done: list[list[Completion | None]] = [[None] * len(row) for row in seeds]
        training = self._policy.model.training
        self._policy.model.eval()
        for batch in self._batches(prompts, sampling, seeds):
            for row in self._generate(batch, prompts, sampling, seeds, schemas):
                done[row.prompt][row.sample] = self._completion(row, prompts)
        self._policy.model.train(training)
        return done  # type: ignore[return-value] - every place is filled

    def _batches(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seeds: Sequence[Sequence[int]]
    ) -> Iterator[list[int]]:
        """Prompt indices, longest first, cut so that a batch stays within the token budget."""
        batch: list[int] = []
        rows = 0
        for index in sorted(range(len(prompts)), key=lambda i: -len(_ids(prompts[i]))):
            longest = len(_ids(prompts[batch[0] if batch else index])) + sampling.max_new_tokens
            if batch and (rows + len(seeds[index])) * longest > self._batch_tokens:
                yield batch
                batch, rows = [], 0
            batch.append(index)
            rows += len(seeds[index])
        if batch:
            yield batch

    def _generate(
        self,
        batch: list[int],
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None,
    ) -> list[_Row]:
        model, device = self._policy.model, self._policy.device
        rows = [
            _Row(p, s, [], [], self._matcher(schemas, p))
            for p in batch
            for s in range(len(seeds[p]))
        ]
        if not rows:
            return []
        draws = torch.from_numpy(
            np.stack(
                [
                    np.random.default_rng(seeds[row.prompt][row.sample]).random(
                        sampling.max_new_tokens, dtype=np.float32
                    )
                    for row in rows
                ]
            )
        ).to(device)  # (rows, max_new_tokens) uniform
        ids, mask = _left_padded([_ids(prompts[p]) for p in batch])
        cache = DynamicCache(config=model.config)
        repeats = torch.tensor([len(seeds[p]) for p in batch])
        logits = _last_logits(model, ids.to(device), mask.to(device), cache)
        parent = torch.repeat_interleave(torch.arange(len(batch)), repeats)
        cache.batch_select_indices(parent.to(device))
        mask, logits = mask[parent].to(device), logits[parent.to(device)]
        active = torch.arange(len(rows))
        ends = self._ends.to(device)
        finished = torch.zeros(len(rows), dtype=torch.bool)
        for step in range(sampling.max_new_tokens):
            allowed = None
            if self._grammars is not None and schemas is not None:
                matchers = [None if finished[at] else rows[at].matcher for at in active.tolist()]
                allowed = self._grammars.allowed(matchers, logits.shape[1]).to(device)
            tokens, logprobs = draw(logits, sampling, draws[active.to(device), step], allowed)
            stopped = torch.isin(tokens, ends).cpu()
            for at, token, logprob in zip(
                active.tolist(), tokens.tolist(), logprobs.tolist(), strict=True
            ):
                if not finished[at]:
                    rows[at].token_ids.append(token)
                    rows[at].logprobs.append(logprob)
                    if (matcher := rows[at].matcher) is not None:
                        matcher.consume_token(token)
            before = finished[active]
            finished[active[stopped]] = True
            alive = ~finished[active]
            count_tokens(int((~before).sum()), responses=int((~before & ~alive).sum()))
            if not alive.any():
                break
            if alive.float().mean() < _COMPACT_BELOW:
                keep = torch.nonzero(alive).squeeze(-1)
                active, chosen = active[keep], keep.to(device)
                cache.batch_select_indices(chosen)
                mask, tokens = mask[chosen], tokens[chosen]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if step + 1 < sampling.max_new_tokens:
                logits = _last_logits(model, tokens[:, None], mask, cache)
        count_tokens(0, responses=int((~finished).sum()))  # cut at the limit
        return rows

    def _matcher(self, schemas: Sequence[dict[str, Any]] | None, prompt: int) -> LLMatcher | None:
        if schemas is None:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self._policy.tokenizer, self._ends.tolist())
        return self._grammars.start(schemas[prompt])

    def _completion(self, row: _Row, prompts: Sequence[Prompt]) -> Completion:
        stopped = row.token_ids[-1] in self._ends
        return Completion(
            text=self._bytes.text(row.token_ids),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            token_ids=row.token_ids,
            logprobs=row.logprobs,
            prompt_token_ids=_ids(prompts[row.prompt]),
        )


def draw(
    logits: torch.Tensor,
    sampling: SamplingConfig,
    uniform: torch.Tensor,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled ids and their log-probabilities before mask and truncation, both (rows,).

    logits: (rows, vocab); uniform: (rows,) in [0, 1); allowed: (rows, vocab) bool, the tokens to
    draw from, None for all. Temperature 0 takes the likeliest token and reports its log-probability
    at temperature 1.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    log_p = log_q = torch.log_softmax(scaled, dim=-1)
    if allowed is not None:
        # Normalised among what is allowed: the policy may give all of it less than float32 can say.
        log_q = torch.log_softmax(scaled.masked_fill(~allowed, -torch.inf), dim=-1)
    if sampling.temperature == 0:
        tokens = log_q.argmax(-1)
    else:
        probs, order = truncated(log_q.exp(), sampling)
        cumulative = probs.cumsum(-1)
        total = cumulative[:, -1:].contiguous()
        at = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
        # A product that rounds up to the total would fall past the last token that may be drawn.
        at = torch.minimum(at, torch.searchsorted(cumulative, total))
        tokens = (at if order is None else order.gather(-1, at)).squeeze(-1)
    return tokens, log_p.gather(-1, tokens[:, None]).squeeze(-1)


def truncated(
    probs: torch.Tensor, sampling: SamplingConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities after top-k and then top-p, not renormalised, and the ids that they belong to.

    probs: (rows, vocab). Returns (rows, kept) with (rows, kept) ids in falling order, or the input
    and None when nothing is cut off. The likeliest token is always kept.
    """
    vocab = probs.shape[-1]
    if not sampling.truncates:
        return probs, None
    kept, order = probs.topk(min(sampling.top_k or vocab, vocab), dim=-1)
    if sampling.top_p < 1:
        share = kept / kept.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share
        kept = kept.masked_fill(before >= sampling.top_p, 0.0)
    return kept, order


def _ids(prompt: Prompt) -> list[int]:
    assert prompt.token_ids is not None, "a local sampler is given token ids"
    return prompt.token_ids


def _left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both (rows, longest) int64, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def _last_logits(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """Next-token logits (rows, vocab); `cache` grows by the ids."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


ENGINE: type[Engine] = TransformersEngine
