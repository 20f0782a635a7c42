"""Annotation by a policy through its own sampler: the method's "online self" (METHOD.md)."""

import logging
import time
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ...data.store import content_hash
from ...schemas.configs import PolicyConfig, SamplingConfig, SegmentConfig, SelfAnnotator
from ...schemas.labels import FinishReason
from ...schemas.tables import ANNOTATIONS
from ...trace.prompt import render_chat
from ...trace.protocols import Completion, PolicyInfo, Prompt, Sampler
from ..samplers.constrained import require_writable
from .bounds import bounded_schema
from .dialogue import Answer, Dialogue, Question, dialogue, usage
from .prompting import AnnotationPrompt, Messages
from .rows import SKIPPED, Identity, Reading, annotation_row, items

logger = logging.getLogger(__name__)


class PolicyAnnotator:
    """Asks a sampler; in training that sampler follows the current weights.

    All rollouts of a part are asked in one batch, then those whose answers need another turn. With
    `structured` decoding is constrained to answers that are valid and within the limit, so there
    are no other turns.
    """

    def __init__(
        self,
        config: SelfAnnotator,
        prompt: AnnotationPrompt,
        segment: SegmentConfig,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Raises InputError if the policy can't write a structured answer within the limit."""
        self._config, self._prompt, self._segment = config, prompt, segment
        self._sampler, self._tokenizer = sampler, tokenizer
        self._warned = False
        if config.structured:
            longest = self._schema(segment.max_segments)
            if tokenizer is not None:
                require_writable(tokenizer, longest, "annotator.structured=false")

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`."""
        work = list(items(problems, rollouts, verdicts, self._segment))
        talks: dict[int, Dialogue] = {}
        questions: dict[int, Question] = {}
        answers: dict[int, list[Answer]] = {}
        readings: dict[int, Reading] = {}
        for index, item in enumerate(work):
            if item.correct is None:
                continue
            talks[index] = dialogue(self._prompt, item, self._config)
            questions[index] = next(talks[index])
            answers[index] = []
        while questions:
            asked = dict(questions)
            questions.clear()
            seeds = [
                turn_seed(self._config.seed, work[index].rollout_id, len(answers[index]))
                for index in asked
            ]
            schemas = None
            if self._config.structured:
                schemas = [self._schema(len(work[index].segments)) for index in asked]
            given = self._ask(list(asked.values()), seeds, schemas)
            for index, answer in zip(asked, given, strict=True):
                answers[index].append(answer)
                try:
                    questions[index] = talks[index].send(answer)
                except StopIteration as done:
                    readings[index] = done.value
        who = Identity(
            self._config.name, annotating_model(self._sampler.policy), self._prompt.version
        )
        return ANNOTATIONS.table(
            annotation_row(item, who, SKIPPED)
            if index not in readings
            else annotation_row(
                item, who, readings[index], usage(answers[index]), answers[index][-1].text
            )
            for index, item in enumerate(work)
        )

    def close(self) -> None:
        """Nothing to release: the sampler belongs to the caller."""

    def _schema(self, segments: int) -> dict[str, Any]:
        config = self._config
        return bounded_schema(self._prompt, segments, config.max_spans, config.max_new_tokens)

    def _ask(
        self, questions: list[Question], seeds: list[int], schemas: list[dict[str, Any]] | None
    ) -> list[Answer]:
        """Answers in order. A sampler takes one limit per batch, so there is a batch per limit."""
        out: dict[int, Answer] = {}
        for limit in sorted({question.max_new_tokens for question in questions}):
            batch = [i for i, question in enumerate(questions) if question.max_new_tokens == limit]
            sampling = SamplingConfig(temperature=self._config.temperature, max_new_tokens=limit)
            prompts = [self._render(questions[i].messages) for i in batch]
            self._warn_of_long(prompts, limit)
            began = time.monotonic()
            groups = self._sampler.sample(
                prompts,
                sampling,
                [[seeds[i]] for i in batch],
                None if schemas is None else [schemas[i] for i in batch],
            )
            latency_s = time.monotonic() - began
            for i, prompt, (completion,) in zip(batch, prompts, groups, strict=True):
                out[i] = _answer(prompt, completion, latency_s)
        return [out[i] for i in range(len(questions))]

    def _warn_of_long(self, prompts: list[Prompt], limit: int) -> None:
        """Log how many questions leave no room for an answer; a server's context is its own to check."""
        context = getattr(self._sampler, "context", None)
        lengths = [len(prompt.token_ids or ()) + limit for prompt in prompts]
        long = 0 if context is None else sum(length > context for length in lengths)
        if long and not self._warned:
            self._warned = True  # once: in training each step asks
            logger.warning(
                "%d of %d questions with an answer of up to %d tokens are longer than the context of %d "
                "tokens of policy %s: its answers may be worth little",
                long,
                len(prompts),
                limit,
                context,
                self._sampler.policy.name,
            )

    def _render(self, messages: Messages) -> Prompt:
        # A structured answer has no place for thinking: say so to templates that would open it.
        thinking = False if self._config.structured else None
        if self._tokenizer is None:
            return Prompt(messages, thinking=thinking)
        return Prompt(messages, render_chat(self._tokenizer, messages, thinking), thinking)


def annotating_policy(config: SelfAnnotator, base: PolicyConfig) -> PolicyConfig | None:
    """The policy that annotates in training beside the student; None: the student itself."""
    return config.policy or (base if config.weights == "base" else None)


def annotating_model(policy: PolicyInfo) -> str:
    """Whose weights annotated: name@revision, and +steps once training has moved them."""
    return f"{policy.name}@{policy.revision}" + (f"+{policy.step}" if policy.step else "")


def turn_seed(base: int, rollout_id: str, turn: int) -> int:
    """The seed of one turn about one rollout: 31 bits."""
    return int(content_hash([base, rollout_id, turn], 8), 16) & 0x7FFFFFFF


def _answer(prompt: Prompt, completion: Completion, latency_s: float) -> Answer:
    prompt_ids = completion.prompt_token_ids or prompt.token_ids
    return Answer(
        completion.text,
        cut=completion.finish_reason == FinishReason.LENGTH,
        prompt_tokens=len(prompt_ids) if prompt_ids is not None else None,
        completion_tokens=None if completion.token_ids is None else len(completion.token_ids),
        latency_s=latency_s,
    )
