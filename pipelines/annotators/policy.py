"""Annotation by a policy through its own sampler: the method's "online self" (METHOD.md)."""

import logging
import time

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ...data.store import content_hash
from ...schemas.configs import SamplingConfig, SegmentConfig, SelfAnnotator
from ...schemas.labels import FinishReason
from ...schemas.tables import ANNOTATIONS
from ...trace.prompt import render_chat
from ...trace.protocols import Completion, Prompt, Sampler
from .dialogue import Answer, Dialogue, Question, dialogue, usage
from .prompting import AnnotationPrompt, Messages
from .rows import SKIPPED, Identity, Reading, annotation_row, items

logger = logging.getLogger(__name__)


class PolicyAnnotator:
    """Asks a sampler; in training that sampler follows the current weights.

    All rollouts of a part are asked in one batch, then those whose answers need another turn.
    """

    def __init__(
        self,
        config: SelfAnnotator,
        prompt: AnnotationPrompt,
        segment: SegmentConfig,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._config, self._prompt, self._segment = config, prompt, segment
        self._sampler, self._tokenizer = sampler, tokenizer

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`."""
        work = items(problems, rollouts, verdicts, self._segment)
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
            for index, answer in zip(asked, self._ask(list(asked.values()), seeds), strict=True):
                answers[index].append(answer)
                try:
                    questions[index] = talks[index].send(answer)
                except StopIteration as done:
                    readings[index] = done.value
        policy = self._sampler.policy
        who = Identity(self._config.name, f"{policy.name}@{policy.revision}", self._prompt.version)
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

    def _ask(self, questions: list[Question], seeds: list[int]) -> list[Answer]:
        """Answers in order. A sampler takes one limit per batch, so there is a batch per limit."""
        out: dict[int, Answer] = {}
        for limit in sorted({question.max_new_tokens for question in questions}):
            batch = [i for i, question in enumerate(questions) if question.max_new_tokens == limit]
            sampling = SamplingConfig(temperature=self._config.temperature, max_new_tokens=limit)
            prompts = [self._render(questions[i].messages) for i in batch]
            began = time.monotonic()
            groups = self._sampler.sample(prompts, sampling, [[seeds[i]] for i in batch])
            latency_s = time.monotonic() - began
            for i, prompt, (completion,) in zip(batch, prompts, groups, strict=True):
                out[i] = _answer(prompt, completion, latency_s)
        return [out[i] for i in range(len(questions))]

    def _render(self, messages: Messages) -> Prompt:
        if self._tokenizer is None:
            return Prompt(messages)
        return Prompt(messages, render_chat(self._tokenizer, messages))


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
