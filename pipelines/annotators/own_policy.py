"""Annotation by a policy through a sampler, engine `self`: the method's "online self" (METHOD.md).

Online training passes the sampler of the current weights. The annotate stage passes none: the
policy of the config is opened here.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ...data.store import Dataset, content_hash
from ...schemas.configs import PolicyConfig, SamplingConfig, SegmentConfig, SelfAnnotator
from ...schemas.errors import InputError
from ...schemas.labels import FinishReason, SpanKind
from ...schemas.tables import ANNOTATIONS
from ...trace.prompt import render_chat
from ...trace.protocols import PolicyInfo, Prompt, Sampler
from ..paid.questions import Answer, Question, usage
from ..samplers import sampling_engine
from ..samplers.constrained import require_writable
from . import Engine
from .bounds import bounded_schema
from .dialogue import replay
from .prompting import Messages, prompt_of
from .rows import SKIPPED, Identity, Item, Reading, annotation_row, items

logger = logging.getLogger(__name__)


class PolicyAnnotator:
    """Asks a sampler; in training that sampler follows the current weights.

    All rollouts of a part are asked in one batch, then those whose answers need another turn. With
    `structured` decoding is constrained to valid answers within the limit: one turn each.
    """

    def __init__(
        self,
        config: SelfAnnotator,
        segment: SegmentConfig,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase | None,
        closes: bool,
    ) -> None:
        """tokenizer: None where only the sampler's server has it. closes: the sampler with this.

        Raises:
            InputError: the policy can't write a structured answer within the limit.
        """
        self._config, self._segment = config, segment
        self._prompt = prompt_of(config)
        self._sampler, self._tokenizer, self._closes = sampler, tokenizer, closes
        self._warned = False
        if config.structured:
            for kind in SpanKind:
                longest = self._schema(kind, segment.max_segments)
                if tokenizer is not None:
                    require_writable(tokenizer, longest, "annotator.structured=false")

    def annotate(self, problems: pa.Table, rollouts: pa.Table, verdicts: pa.Table) -> pa.Table:
        """See `Annotator`."""
        work = list(items(problems, rollouts, verdicts, self._segment))
        answers: list[list[Answer]] = [[] for _ in work]
        readings = [SKIPPED for _ in work]
        waiting = [index for index, item in enumerate(work) if item.correct is not None]
        while waiting:
            questions: dict[int, Question] = {}
            for index in waiting:
                given = iter(answers[index])
                _, outcome = replay(
                    self._prompt,
                    work[index],
                    self._config,
                    lambda _, given=given: next(given, None),
                )
                if isinstance(outcome, Reading):
                    readings[index] = outcome
                else:
                    questions[index] = outcome
            for index, answer in self._ask(work, questions, answers):
                answers[index].append(answer)
            waiting = list(questions)
        model = annotating_model(self._sampler.policy)
        who = Identity(self._config.name, model, self._prompt.version, self._prompt.reflection)
        return ANNOTATIONS.table(
            annotation_row(item, who, reading, usage(given), given[-1].text)
            if given
            else annotation_row(item, who, reading)
            for item, reading, given in zip(work, readings, answers, strict=True)
        )

    def close(self) -> None:
        if self._closes:
            self._sampler.close()

    def _schema(self, kind: SpanKind, segments: int) -> dict[str, Any]:
        config = self._config
        return bounded_schema(self._prompt, segments, config.max_spans, config.max_new_tokens, kind)

    def _ask(
        self, work: list[Item], questions: dict[int, Question], answers: list[list[Answer]]
    ) -> Iterator[tuple[int, Answer]]:
        """Each row's answer. A sampler takes one token limit per batch: a batch per limit."""
        for limit in sorted({question.max_new_tokens for question in questions.values()}):
            batch = [i for i, question in questions.items() if question.max_new_tokens == limit]
            prompts = [self._render(questions[i].messages) for i in batch]
            self._warn_of_long(prompts, limit)
            seeds = [
                [turn_seed(self._config.seed, work[i].rollout_id, len(answers[i]))] for i in batch
            ]
            schemas = None
            if self._config.structured:
                schemas = [self._schema(work[i].kind, len(work[i].segments)) for i in batch]
            sampling = SamplingConfig(temperature=self._config.temperature, max_new_tokens=limit)
            began = time.monotonic()
            groups = self._sampler.sample(prompts, sampling, seeds, schemas)
            latency_s = time.monotonic() - began
            for i, prompt, (completion,) in zip(batch, prompts, groups, strict=True):
                prompt_ids, ids = (
                    completion.prompt_token_ids or prompt.token_ids,
                    completion.token_ids,
                )
                yield (
                    i,
                    Answer(
                        completion.text,
                        cut=completion.finish_reason == FinishReason.LENGTH,
                        prompt_tokens=None if prompt_ids is None else len(prompt_ids),
                        completion_tokens=None if ids is None else len(ids),
                        latency_s=latency_s,
                    ),
                )

    def _warn_of_long(self, prompts: list[Prompt], limit: int) -> None:
        """Log how many questions leave no room for an answer. A server checks its own context."""
        context = getattr(self._sampler, "context", None)
        lengths = [len(prompt.token_ids or ()) + limit for prompt in prompts]
        long = 0 if context is None else sum(length > context for length in lengths)
        if long and not self._warned:
            self._warned = True  # once: in training each step asks
            logger.warning(
                "%d of %d questions with an answer of up to %d tokens are longer than the "
                "context of %d "
                "tokens of policy %s: its answers may be worth little",
                long,
                len(prompts),
                limit,
                context,
                self._sampler.policy.name,
            )

    def _render(self, messages: Messages) -> Prompt:
        # A structured answer has no place for thinking: chat templates that open it must not.
        thinking = False if self._config.structured else None
        if self._tokenizer is None:
            return Prompt(messages, thinking=thinking)
        return Prompt(messages, render_chat(self._tokenizer, messages, thinking), thinking)


def annotating_policy(config: SelfAnnotator, student: PolicyConfig | None) -> PolicyConfig | None:
    """The policy with weights of its own that annotates; None: the student's current weights."""
    return config.policy or (student if config.weights == "base" else None)


def annotating_model(policy: PolicyInfo) -> str:
    """The weights that annotate: name@revision, and +steps once training has moved them."""
    return f"{policy.name}@{policy.revision}" + (f"+{policy.step}" if policy.step else "")


def turn_seed(base: int, rollout_id: str, turn: int) -> int:
    """The seed of one turn about one rollout: 31 bits."""
    return int(content_hash([base, rollout_id, turn], 8), 16) & 0x7FFFFFFF


def _identity(config: SelfAnnotator, problems: Dataset, in_training: bool) -> dict[str, Any]:
    identity = prompt_of(config).sha256
    if config.policy is not None:
        return identity | {"policy": sampling_engine(config.sampler, config.policy).identity()}
    if not in_training:
        raise InputError(
            "annotator.policy is not set; name the policy that annotates (only in training it may "
            "be left out, for the current weights)"
        )
    return identity


def _open_sampler(
    config: SelfAnnotator, student: PolicyConfig | None
) -> tuple[Sampler, PreTrainedTokenizerBase | None] | None:
    policy = annotating_policy(config, student)
    return None if policy is None else sampling_engine(config.sampler, policy).open()


def _open(
    config: SelfAnnotator,
    segment: SegmentConfig,
    *,
    sampler: Sampler | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **_: Any,
) -> PolicyAnnotator:
    if sampler is not None:
        return PolicyAnnotator(config, segment, sampler, tokenizer, closes=False)
    opened = _open_sampler(config, None)
    assert opened is not None, "without a sampler the config names a policy"
    return PolicyAnnotator(config, segment, *opened, closes=True)


ENGINE = Engine(
    _identity,
    _open,
    request_body=lambda config, question: {"messages": question.messages},
    open_sampler=_open_sampler,
)
