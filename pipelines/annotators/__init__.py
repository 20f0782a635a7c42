"""Annotation engines behind one protocol (trace.protocols.Annotator)."""

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
from .journal import Journal
from .prompting import load_prompt


def open_annotator(
    config: Annotator,
    segment: SegmentConfig,
    *,
    journal: Path | None = None,
    sampler: Sampler | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> AnnotatorProtocol:
    """The engine of a config.

    journal: folder in which a paid engine keeps its answers; None keeps none. sampler and
    tokenizer: the policy for engine self, which the caller closes; the tokenizer is None where
    only the sampler's server knows it.

    Raises:
        InputError: a missing key, prompt or schema file.
    """
    if isinstance(config, NoAnnotator):
        from .none import NobodyAnnotator

        return NobodyAnnotator(segment)
    if isinstance(config, RuleAnnotator):
        from .rule import StepsAnnotator

        return StepsAnnotator(config, segment)
    prompt = load_prompt(config.prompt, config.answer_schema)
    if isinstance(config, OpenAIAnnotator):
        from .openai import EndpointAnnotator

        kept = Journal(journal) if journal is not None else None
        return EndpointAnnotator(config, prompt, segment, kept)
    from .policy import PolicyAnnotator

    if sampler is None:
        raise ValueError("engine self needs the policy's sampler")
    return PolicyAnnotator(config, prompt, segment, sampler, tokenizer)
