"""Annotation engines behind one protocol (trace.protocols.Annotator)."""

from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...schemas.configs import (
    Annotator,
    NoAnnotator,
    OpenAIAnnotator,
    RuleAnnotator,
    SegmentConfig,
)
from ...trace.protocols import Annotator as AnnotatorProtocol
from ...trace.protocols import Sampler
from .claims import Claims
from .completion import is_answer
from .journal import Journal
from .prompting import load_prompt
from .spending import Spending, open_spending


def open_annotator(
    config: Annotator,
    segment: SegmentConfig,
    *,
    journal: Path | None = None,
    elsewhere: Callable[[], Iterable[Path]] = lambda: (),
    claims: Path | None = None,
    batches: Path | None = None,
    sampler: Sampler | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    spending: Spending | None = None,
) -> AnnotatorProtocol:
    """The engine of a config.

    journal: folder in which a paid engine keeps its answers; None keeps none. elsewhere: lists other
    journals, whose answers serve too. claims: file by which runs at once share questions in flight.
    batches: folder in which it remembers its batches. sampler and tokenizer: the policy for engine self, which the caller closes; the tokenizer is None where
    only the sampler's server knows it. spending: price, budget and totals of a paid engine, which
    closes it; None: the config's price and budget.

    Raises:
        InputError: a missing key, prompt or schema file, a budget without a price.
    """
    if isinstance(config, NoAnnotator):
        from .none import NobodyAnnotator

        return NobodyAnnotator(segment)
    if isinstance(config, RuleAnnotator):
        from .rule import StepsAnnotator

        return StepsAnnotator(config, segment)
    prompt = load_prompt(config.prompt, config.answer_schema)
    if isinstance(config, OpenAIAnnotator):
        kept = None
        if journal is not None:
            shared = Claims(claims) if claims is not None else None
            kept = Journal(journal, elsewhere, is_answer, shared)
        spending = spending or open_spending(config, journal)
        if config.batch:
            from .openai_batch import BatchAnnotator

            if kept is None or batches is None:
                raise ValueError("engine openai asks in batches only where it has folders")
            return BatchAnnotator(config, prompt, segment, kept, batches, spending)
        from .openai import EndpointAnnotator

        return EndpointAnnotator(config, prompt, segment, kept, spending)
    from .own_policy import PolicyAnnotator

    if sampler is None:
        raise ValueError("engine self needs the policy's sampler")
    return PolicyAnnotator(config, prompt, segment, sampler, tokenizer)
