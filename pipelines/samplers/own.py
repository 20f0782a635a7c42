"""A sampler of your own: `sampler.engine=file.py:Class`. `OwnSampler` below is its manual.

The engine here wraps the class: it checks what the class returns, and turns its exceptions into
one sentence. examples/own-code/sampler.py is a worked example.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...schemas.columns import MOST_LOGPROB
from ...schemas.configs import OwnSampler as OwnSamplerConfig
from ...schemas.configs import PolicyConfig, SamplingConfig
from ...schemas.errors import InputError
from ...schemas.labels import FinishReason
from ...schemas.own_code import OwnCode, build, is_text, iterable, require_methods, running
from ...trace.align import byte_table
from ...trace.clock import Phase
from ...trace.identity import model_revision
from ...trace.policy import load_tokenizer, policy_name, vocab_fingerprint, vocab_size
from ...trace.protocols import Completion, PolicyInfo, Prompt, TrainedPolicy
from ..models import resolve_policy, served_model
from .context_length import policy_context
from .engine import Engine, Training
from .probe import Probe

_BUNDLED = ("micro", "smollm2")


class OwnSampler(Protocol):
    """A class that samples responses.

    It is built with those of these arguments that its `__init__` names:

    - options: `sampler.options` of the config. If the class has an attribute `Options`, a dataclass
      or a pydantic model, they are validated by it and passed as its instance; else as a dict.
    - policy: the config's `policy` (`PolicyConfig`); `policy.path` is the model to sample. In an
      evaluation it is the folder of the trained checkpoint.

    `sample` returns `len(seeds[i])` completions (`trace.protocols.Completion`) for `prompts[i]`.
    The same prompt, parameters and seed should give the same response. A prompt has `messages`,
    and `token_ids` if the tokenizer of `policy.path` is on this machine. schemas is passed only by
    an annotator that samples answers under a JSON schema (annotator.structured).

    A completion needs text and finish_reason. Text alone can be verified, annotated and evaluated.
    To be trained on, it needs the sampler's own token_ids, logprobs and prompt_token_ids as well;
    text is then decoded from the ids.

    Optional:

    - close(): release what it holds.
    - policy: a `trace.protocols.PolicyInfo`; by default the name and hash of `policy.path`.
    - follow(policy, probe): needed in training (`train.sampler`). Called before each online step
      with a `trace.protocols.TrainedPolicy`, which gives the new weights. Under torchrun every rank
      has to call the same of its methods.
    """

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]: ...


class OwnEngine:
    """See `Engine`."""

    served = False
    batch_tokens: int | None = None

    def __init__(self, config: OwnSamplerConfig, policy: PolicyConfig) -> None:
        self._config, self._policy = config, policy
        self._code = config.load("sampler.engine")
        require_methods(self._code, sample="prompts, sampling, seeds")
        self.follows = hasattr(self._code.value, "follow")

    def identity(self) -> list[str]:
        folder = self._folder()
        revision = self._policy.path if folder is None else model_revision(folder)
        return [self._code.sha256, revision]

    def context(self) -> int | None:
        return None if self._folder() is None else policy_context(self._policy)

    def open(self) -> tuple["OwnPolicySampler", PreTrainedTokenizerBase | None]:
        folder = self._folder()
        if folder is None:
            info = PolicyInfo(self._policy.path, self._code.sha256[:16])
            return OwnPolicySampler(self._code, self._built(), info), None
        tokenizer = load_tokenizer(folder, self._policy.trust_remote_code)
        vocabulary = vocab_fingerprint(tokenizer)
        info = PolicyInfo(policy_name(folder), model_revision(folder), 0, vocabulary)
        known = vocab_size(folder)
        return OwnPolicySampler(self._code, self._built(), info, tokenizer, known), tokenizer

    def open_in_training(self, training: Training) -> "OwnPolicySampler":
        policy = training.policy
        known = policy.model.get_input_embeddings().num_embeddings
        if not self.follows:
            raise InputError(
                f"train.{self._code.label}: has no method follow(policy, probe), so it would not "
                "sample with the weights that are trained; add it, or take "
                "train.sampler.engine=transformers"
            )
        return OwnPolicySampler(self._code, self._built(), policy.info, policy.tokenizer, known)

    def _built(self) -> Any:
        return build(self._code, self._config.options, policy=self._policy)

    def _folder(self) -> str | None:
        """The policy's folder if it is on this machine; a name may mean something to the class."""
        path = self._policy.path
        if path in _BUNDLED:
            return resolve_policy(path)
        found = served_model(path)
        return None if found is None else found[0]


class OwnPolicySampler:
    """The class as a `Follower`. Its rows are checked, because tables would keep their faults."""

    def __init__(
        self,
        code: OwnCode,
        own: Any,
        info: PolicyInfo,
        tokenizer: PreTrainedTokenizerBase | None = None,
        known: int | None = None,
    ) -> None:
        """known: token ids of the policy."""
        self._code, self._own, self._info, self._known = code, own, info, known
        self._bytes = None if tokenizer is None else byte_table(tokenizer)

    @property
    def policy(self) -> PolicyInfo:
        own = getattr(self._own, "policy", None) or self._info
        if not isinstance(own, PolicyInfo):
            raise self._fault(f"its attribute policy is {type(own).__name__}, not PolicyInfo")
        return own

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seeds: Sequence[Sequence[int]],
        schemas: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`.

        Raises:
            InputError: the class raises, or returns what no table can hold.
        """
        with running(self._code):
            if schemas is None:
                returned = self._own.sample(prompts, sampling, seeds)
            else:
                returned = self._own.sample(prompts, sampling, seeds, schemas)
            groups = list(iterable(self._code, "sample", returned))
        if len(groups) != len(prompts):
            raise self._fault(f"returned {len(groups)} groups for {len(prompts)} prompts")
        for index, (group, own) in enumerate(zip(groups, seeds, strict=True)):
            if not isinstance(group, Sequence) or len(group) != len(own):
                raise self._fault(f"prompt {index}: returned no list of {len(own)} completions")
        return [[self._checked(one, index) for one in group] for index, group in enumerate(groups)]

    def follow(self, policy: TrainedPolicy, probe: Probe, phase: Phase = lambda _: None) -> None:
        """See `Follower`; the class probes within its hand-over."""
        phase("hand_over")
        with running(self._code):
            self._own.follow(policy, probe)
        self._info = policy.info

    def rest(self, phase: Phase = lambda _: None) -> None:
        """The class keeps its weights until the next `follow`."""

    def close(self) -> None:
        if hasattr(self._own, "close"):
            with running(self._code):
                self._own.close()

    def _checked(self, one: Any, prompt: int) -> Completion:
        def fault(what: str) -> InputError:
            return self._fault(f"prompt {prompt}: {what}")

        if not isinstance(one, Completion) or not isinstance(one.text, str):
            raise fault(f"returned {type(one).__name__}, not Completion(text, finish_reason, …)")
        if one.finish_reason not in list(FinishReason):
            raise fault(f"finish_reason is {one.finish_reason!r}, not stop or length")
        ids, logprobs = one.token_ids, one.logprobs
        for name, some in (("token_ids", ids), ("prompt_token_ids", one.prompt_token_ids)):
            most = 2**31 if self._known is None else self._known
            if some is not None and not isinstance(some, Sequence | np.ndarray):
                raise fault(f"{name} is {type(some).__name__}, not a list")
            if some is not None and not all(
                isinstance(token, int | np.integer) and 0 <= token < most for token in some
            ):
                raise fault(f"{name} has an entry that is no token id (0 … {most - 1})")
        if logprobs is not None:
            try:
                numbers = np.asarray(logprobs, dtype=np.float64)
            except (TypeError, ValueError):
                raise fault("logprobs is no list of numbers") from None
            if ids is None or numbers.shape != (len(ids),):
                raise fault("logprobs has another length than token_ids")
            if not (np.isfinite(numbers) & (numbers <= MOST_LOGPROB)).all():
                raise fault("logprobs has a number that is no natural logarithm of a probability")
        text = one.text if ids is None or self._bytes is None else self._bytes.text(list(ids))
        if not is_text(text):
            raise fault("text holds half of a surrogate pair")
        return Completion(
            text, FinishReason(one.finish_reason), ids, logprobs, one.prompt_token_ids
        )

    def _fault(self, what: str) -> InputError:
        return InputError(f"{self._code.label}: {what}; see OwnSampler in {__name__}")


ENGINE: type[Engine] = OwnEngine
