"""Annotation engines: a registry from a config's tag to the file of its engine.

Called by the annotate stage, its estimate, online training and the flows. An engine's file is
imported when a config names it, because each needs other packages. own.py is the engine of classes
that a config names as `file.py:Class`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...data.store import Dataset
from ...schemas.configs import Annotator, PolicyConfig, SegmentConfig
from ...schemas.own_code import is_own
from ...trace.protocols import Annotator as AnnotatorProtocol
from ...trace.protocols import Sampler
from ..paid.questions import Question

if TYPE_CHECKING:  # engines that call no model start without transformers
    from transformers import PreTrainedTokenizerBase

_FILES = {"none": "none", "rule": "rule", "self": "own_policy", "openai": "openai"}


def _no_sampler(config: Any, student: PolicyConfig | None) -> None:
    return None


@dataclass(frozen=True)
class Engine:
    """What an engine answers about a config of its own: the `ENGINE` of its file.

    identity(config, problems, in_training): what a dataset id hashes in place of paths;
        in_training: a policy that is left out stands for the current weights. Raises InputError
        for every fault that can be found before the first row.
    open(config, segment, **given): the annotator; see `open_annotator`.
    asks_endpoint: its requests are billed. Its journal, budget and pace belong to one process.
    request_body(config, question): what is sent for a question; None: no model is asked.
    open_sampler(config, student): sampler and tokenizer of a policy that annotates with weights of
        its own; None: there is none. student: the policy that is trained.
    """

    identity: Callable[[Any, Dataset, bool], dict[str, Any]]
    open: Callable[..., AnnotatorProtocol]
    asks_endpoint: bool = False
    request_body: Callable[[Any, Question], dict[str, Any]] | None = None
    open_sampler: Callable[
        [Any, PolicyConfig | None], "tuple[Sampler, PreTrainedTokenizerBase | None] | None"
    ] = _no_sampler


def engine_of(config: Annotator) -> Engine:
    file = "own" if is_own(config.engine) else _FILES[config.engine]
    return import_module(f".{file}", __package__).ENGINE


def open_annotator(config: Annotator, segment: SegmentConfig, **given: Any) -> AnnotatorProtocol:
    """The annotator of a config. Each engine takes of `given` what it needs:

    journal: folder in which a paid engine keeps its answers; without one it keeps none.
    elsewhere: function that lists the folders of other journals, whose answers serve too.
    claims: file by which concurrent runs share questions in flight.
    batches: folder in which a paid engine keeps the state of its batches.
    parts: function that yields the tables of all parts whose questions a batch may hold.
    spending: price, budget and totals of a paid engine, which closes it.
    sampler, tokenizer: the annotating policy, which the caller closes; without them engine self
        opens the policy that its config names.

    Raises:
        InputError: a missing key, prompt or schema file, a budget without a price.
    """
    return engine_of(config).open(config, segment, **given)
